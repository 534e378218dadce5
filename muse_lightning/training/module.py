"""LanguageModel: what a training, validation, test or prediction step does with a batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LambdaLR

from muse_lightning.attention import AttentionStrategy, Dense, exact_attention, exact_in, is_exact, layer_numbers
from muse_lightning.attention.partly_exact import partly_exact_in
from muse_lightning.data.batches import IGNORED_LABEL, Batch
from muse_lightning.errors import UserError
from muse_lightning.measure.attention_error import partly_exact
from muse_lightning.model.config import LlamaConfig
from muse_lightning.model.llama import Llama
from muse_lightning.parallelize import (
    Recompute,
    ResidualDtype,
    arrange,
    shard_parameters,
)
from muse_lightning.pretrained.run_folder import CHECKPOINT_PREFIX
from muse_lightning.pretrained.tensors import check_shapes
from muse_lightning.training.checks import check_ranges, check_sizes
from muse_lightning.training.exact_heads import say_if_spread, take_heads
from muse_lightning.training.log_step import counting_as_after, ends_step, is_log_step
from muse_lightning.training.loss import next_token_nats, total_nats
from muse_lightning.training.muon import check_strategy
from muse_lightning.training.optim import (
    OptimizerName,
    Schedule,
    apply_hyperparameters,
    check_states,
    learning_rate_factor,
    make_optimizer,
    numbered_by_model,
    parameter_groups,
)
from muse_lightning.training.totals import Totals, ranks_per_block
from muse_lightning.training.weights import load_weights


class LanguageModel(L.LightningModule):
    """A Llama that learns to predict the next token.

    A batch holds `input_ids` and `labels`, int64 [B, N], and, where documents are told apart, `cu_seqlens`, int32
    (docs/data.md). The loss that is minimised is the sum over labels divided by B * N, a constant, so that
    micro-batches and ranks add up exactly; the one that is logged is divided by the number of labels.

    Args:
        config: the architecture.
        attention: what each layer does with queries, keys and values, made from the number of the layer.
        exact_layers: numbers of layers that attend exactly instead, from 0; negative ones count from the last, -1.
        exact_heads: key-value heads of the other layers, counted over all of them, that attend exactly instead, each
            with the query heads that share it; the callback `ExactHeads` chooses where its error adds most.
        recompute: "block" keeps only the input of each block and computes the rest again in the backward pass: far less
            memory for about a third more work; "keep_attention" also keeps what goes into and comes out of attention,
            its dearest part on long contexts; "none" keeps everything.
        recompute_every: `recompute` is for one block in so many; the others keep everything. Larger is faster until the
            device is full.
        offload: keep in the host's memory what blocks that are computed again keep; it comes and goes while the device
            computes. It takes that memory on the host, pinned, instead.
        mlp_tiles: pieces of the tokens that the feed-forward network runs over, so that what lies inside it exists for
            one piece at a time. More take less memory; the network is computed again in the backward pass.
        compiled: compile what lies before and after attention in each block, and the loss after its matrix products,
            with torch.compile. The first step is slow; needs a C compiler.
        residual_dtype: of the residual stream between blocks; "parameters" is float32 in mixed precision, "autocast"
            the dtype of matrix products: less memory and traffic, but what a block adds is rounded.
        optimizer: "adamw" for everything, or "muon" for the matrices of blocks and AdamW for the rest, with the same
            learning rate and weight decay. Muon keeps one number per weight instead of two; one device or DDP.
        learning_rate: the peak, reached after the warm-up.
        weight_decay: of matrices; norms and biases do not decay.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's term in the denominator.
        momentum: Muon's.
        warmup_steps: optimizer steps over which the learning rate rises linearly.
        schedule: after the warm-up, "cosine" falls all the way to trainer.max_steps; "wsd" stays at the peak and falls
            linearly at the end.
        decay_fraction: the end of "wsd", as a part of trainer.max_steps.
        min_lr_ratio: the learning rate at the end over the peak.
        loss_chunk: tokens whose logits exist at once. Larger is faster until the device is full; in mixed precision it
            takes about loss_chunk * vocab_size * 10 bytes, compiled 2.
        weights: weights to start from, loaded before step 0: a Hugging Face folder, a run folder (its newest
            checkpoint), a .ckpt or a .safetensors file. A checkpoint that is resumed has its own.
        exact_val_batches: batches of each validation that are also evaluated with exact attention, for val/loss_exact.
        seq_len: context length that will be used, in tokens (the command line links it to data.seq_len); it is checked
            against the architecture and the attention.
        tokenizer_size: ids that the tokenizer may give (the command line links it to the data); checked against
            config.vocab_size.
    Raises:
        UserError: a value out of range, a tokenizer or context too large for the architecture, or sizes that the
            attention cannot work with.
    """

    def __init__(
        self,
        config: LlamaConfig,
        attention: Callable[[int], AttentionStrategy] = Dense,
        exact_layers: tuple[int, ...] = (),
        exact_heads: int = 0,
        recompute: Recompute = "none",
        recompute_every: int = 1,
        offload: bool = False,
        mlp_tiles: int = 1,
        compiled: bool = False,
        residual_dtype: ResidualDtype = "parameters",
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        warmup_steps: int = 100,
        schedule: Schedule = "cosine",
        decay_fraction: float = 0.2,
        min_lr_ratio: float = 0.1,
        loss_chunk: int = 2048,
        weights: Path | None = None,
        exact_val_batches: int = 1,
        seq_len: int | None = None,
        tokenizer_size: int | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._arguments = arguments
        self.config = config
        self.exact_layers = exact_layers
        self.exact_heads = exact_heads
        self.recompute: Recompute = recompute
        self.recompute_every = recompute_every
        self.offload = offload
        self.mlp_tiles = mlp_tiles
        self.compiled = compiled
        self.residual_dtype: ResidualDtype = residual_dtype
        self.optimizer: OptimizerName = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.momentum = momentum
        self.warmup_steps = warmup_steps
        self.schedule: Schedule = schedule
        self.decay_fraction = decay_fraction
        self.min_lr_ratio = min_lr_ratio
        self.loss_chunk = loss_chunk
        self.weights = weights
        self._are_weights_due = weights is not None
        self.exact_val_batches = exact_val_batches
        self.seq_len = seq_len
        self.tokenizer_size = tokenizer_size
        check_ranges(self)
        # On the meta device a model of any size is free; `configure_model` makes it real on the device it will live on.
        layers, window = config.num_hidden_layers, config.sliding_window
        attention = exact_in(exact_layers, attention, num_layers=layers, window=window)
        attention = partly_exact_in(
            exact_heads,
            attention,
            exact_layers=layer_numbers(exact_layers, layers, "model.exact_layers"),
            num_layers=layers,
            num_kv_heads=config.num_key_value_heads,
            window=window,
        )
        with torch.device("meta"):
            self.llama = Llama(config, attention)
        self.partly_exact = partly_exact(self.llama)
        """What the recipe attends with in layers of which some heads are exact, also while others take its place."""
        self.are_heads_chosen = False
        """Whether the exact heads are those of a training, and not where they are before any was measured."""
        self.offloading = arrange(
            self.llama,
            recompute=recompute,
            recompute_every=recompute_every,
            mlp_tiles=mlp_tiles,
            offload=offload,
            compiled=compiled,
            residual_dtype=residual_dtype,
        )
        check_sizes(self)
        self.has_trained = False
        """Whether a training step was begun in this process."""
        self.is_counting = True
        """Whether training steps count in what is logged; not while one is computed a second time."""
        self.tokens_seen = 0
        """Tokens trained on by all ranks, over the whole life of the run."""
        self._train_totals = Totals()
        self._eval_totals = Totals()
        self._exact_totals = Totals()
        self._token_bytes: Tensor | None = None
        self._until_teardown = ExitStack()

    @property
    def attends_exactly(self) -> bool:
        """Whether the attention of every layer is exact now, whatever the recipe has."""
        window = self.config.sliding_window
        return all(is_exact(block.self_attn.attention, window) for block in self.llama.blocks)

    @property
    def chosen_heads(self) -> dict[int, list[int]]:
        """The key-value heads that are exact, by the number of a layer of which some may be."""
        return {strategy.layer_idx: list(strategy.heads) for strategy in self.partly_exact}

    @property
    def has_choice(self) -> bool:
        """Whether some of these heads are exact, and others of the same layers not."""
        return any(len(strategy.heads) < strategy.num_kv_heads for strategy in self.partly_exact)

    def choose_heads(self, heads: Mapping[int, Sequence[int]], *, is_choice: bool = True) -> None:
        """Make others exact.

        Args:
            heads: as in `chosen_heads`.
            is_choice: whether they are more than where a training begins.
        """
        for strategy in self.partly_exact:
            strategy.heads = tuple(heads[strategy.layer_idx])
        self.are_heads_chosen = is_choice

    def twin(self, **changes: Any) -> Self:
        """A model of the same options but for some, with no weights yet.

        Raises:
            UserError: as the constructor.
        """
        return type(self)(**(self._arguments | changes))

    def configure_model(self) -> None:
        """Allocate and fill the weights, on the current default device; nothing if that has been done."""
        if not self.llama.lm_head.weight.is_meta:
            return
        if self.device_mesh is not None:
            shard_parameters(self.llama, _data_parallel(self.device_mesh))
        self.llama.to_empty(device=torch.get_default_device())
        self.llama.init_weights()

    def cpu(self) -> Self:
        """Move to the CPU, if there is anything yet: Lightning asks for it after an error at set-up too, and another
        error from here would hide that one."""
        return self if self.llama.lm_head.weight.is_meta else super().cpu()

    def token_nats(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of every label, float32 [B, N], 0 where there is none; without gradients."""
        with torch.no_grad():
            hidden = self.llama.hidden_states(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"))
        head = self.llama.lm_head.weight
        return next_token_nats(hidden, head, batch["labels"], chunk=self.loss_chunk, compiled=self.compiled)

    def total_nats(self, batch: Batch) -> Tensor:
        """Their sum, float32 [], with gradients."""
        hidden = self.llama.hidden_states(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"))
        head = self.llama.lm_head.weight
        return total_nats(hidden, head, batch["labels"], chunk=self.loss_chunk, compiled=self.compiled)

    def load_weights_once(self) -> None:
        """Load `weights`, unless they have been loaded or a checkpoint has brought others."""
        if self._are_weights_due:
            assert self.weights is not None
            for difference in load_weights(self.llama, self.weights):
                rank_zero_info(difference)
            self._are_weights_due = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is optimized, with the recipe's options, as `make_optimizer` takes it."""
        return parameter_groups(
            self.llama,
            self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            momentum=self.momentum,
        )

    # Training

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse a strategy that the optimizer cannot have.

        Raises:
            UserError: names the strategy.
        """
        if self.optimizer == "muon":
            check_strategy(strategy)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_strategy(self.trainer.strategy)

    def teardown(self, stage: str) -> None:
        self._until_teardown.close()

    def on_fit_start(self) -> None:
        # Not in configure_model: there it is not known yet whether a checkpoint will be resumed.
        self.load_weights_once()

    def on_train_start(self) -> None:
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        for difference in apply_hyperparameters(scheduler, self.parameter_groups()):
            rank_zero_info(difference)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.has_trained = True
        nats = self.total_nats(batch)
        labels = batch["labels"]
        if self.is_counting:
            self._train_totals.add(nats, (labels != IGNORED_LABEL).sum())
            # Ranks that share a sequence have read the same tokens.
            self.tokens_seen += labels.numel() * (self.trainer.world_size // ranks_per_block(self.trainer))
        return nats / labels.numel()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the loss of the optimizer step that just ended: over all its micro-batches and ranks, by label; and free
        its gradients, which Lightning would keep until the next forward pass is over."""
        if not ends_step(self.trainer):
            return
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        if is_log_step(self.trainer, self.trainer.global_step):
            nats, labels = self._train_totals.collect(self.trainer)
            self.log("train/loss", _mean(nats, labels), prog_bar=True)
            self.log("train/tokens", float(self.tokens_seen))
        self._train_totals.clear()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and its learning rate as a function of the optimizer step."""
        optimizer = make_optimizer(self.parameter_groups(), fused=self.device.type in ("cuda", "cpu", "mps"))
        factor = learning_rate_factor(
            self.schedule,
            max_steps=self.trainer.max_steps,
            warmup_steps=self.warmup_steps,
            min_lr_ratio=self.min_lr_ratio,
            decay_fraction=self.decay_fraction,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def on_predict_start(self) -> None:
        self.load_weights_once()
        say_if_spread(self)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Log-likelihood of every label, float32 [B, N], 0 where there is none, beside the labels themselves."""
        return {"log_likelihood": -self.token_nats(batch), "labels": batch["labels"]}

    def _start_evaluation(self) -> None:
        self.load_weights_once()
        say_if_spread(self)
        token_bytes = getattr(getattr(self.trainer, "datamodule", None), "token_bytes", None)
        self._token_bytes = None if token_bytes is None else token_bytes.to(self.device)

    def _evaluate(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        nats = self.token_nats(batch)
        labels = batch["labels"]
        is_label = labels != IGNORED_LABEL
        count = is_label.sum()
        lengths = torch.zeros_like(count)
        if self._token_bytes is not None:
            lengths = (self._token_bytes[labels.clamp(min=0)] * is_label).sum()
        self._eval_totals.add(nats.sum(), count, lengths)
        if batch_idx < self.exact_val_batches:
            with self.llama.attention_as(exact_attention(self.config.sliding_window)):
                self._exact_totals.add(self.token_nats(batch).sum(), count)
        return {"nats": nats}

    def _log_evaluation(self, stage: str) -> None:
        nats, labels, length = self._eval_totals.collect(self.trainer)
        loss = _mean(nats, labels)
        metrics = {f"{stage}/loss": loss, f"{stage}/ppl": math.exp(min(loss, 700.0))}  # e^700 is near the largest float
        if length > 0:
            metrics[f"{stage}/bpb"] = nats / (math.log(2) * length)
        if self._exact_totals:
            metrics[f"{stage}/loss_exact"] = _mean(*self._exact_totals.collect(self.trainer))
        # Equal on all ranks already: sync_dist only tells Lightning so.
        self.log_dict(metrics, sync_dist=True, prog_bar=True)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["exact_heads"] = self.chosen_heads
        checkpoint["are_exact_heads_chosen"] = self.are_heads_chosen
        states = checkpoint.get("optimizer_states")
        if states and self.device_mesh is None:  # of shards, Lightning numbers them so
            pairs = zip(states, self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [numbered_by_model(state, optimizer, self) for state, optimizer in pairs]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture before anything is loaded from it.

        Raises:
            UserError: names the first tensor that differs, with both shapes, or the optimizer.
        """
        path = self.trainer.ckpt_path if self._trainer is not None else None
        if "state_dict" in checkpoint:  # where parameters are sharded, they have been loaded by now
            model = {CHECKPOINT_PREFIX + name: tensor.shape for name, tensor in self.llama.state_dict().items()}
            found = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
            check_shapes(model, found, f"checkpoint {path}" if path else "the checkpoint")
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_states(checkpoint.get("optimizer_states", []), self.optimizer, path)
        elif self._trainer is not None:
            self._until_teardown.enter_context(counting_as_after(self.trainer, checkpoint.get("global_step", 0)))
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        heads = checkpoint.get("exact_heads", {})
        are_chosen = checkpoint.get("are_exact_heads_chosen", bool(heads))
        take_heads(self, heads, self._trainer, are_chosen=are_chosen)
        self._are_weights_due = False


def _data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            f"trainer.strategy: tensor_parallel_size is {mesh['tensor_parallel'].size()}; accepted: 1, parameters are "
            "sharded over data_parallel_size"
        )
    return mesh["data_parallel"]


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan
