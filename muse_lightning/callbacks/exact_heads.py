"""Which heads attend exactly, where a model has some that do."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from muse_lightning.attention.description import heads_in_words
from muse_lightning.attention.partly_exact import beyond_rounding, choose_heads
from muse_lightning.callbacks.context_warmup import ContextWarmup
from muse_lightning.errors import UserError
from muse_lightning.measure.attention_error import errors_by_head
from muse_lightning.training.log_step import ends_step, is_log_step
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.trainer_callbacks import callbacks_of


class ExactHeads(L.Callback):
    """Chooses the `model.exact_heads` key-value heads that attend exactly: those whose error adds most.

    What it costs is in few heads, in others from model to model (docs/training.md). Every so many steps the model is
    run once more, without gradients, on the batch of the step that follows, and attention without exact heads is
    compared with exact attention, head by head: by what the error adds to the residual stream, over what the layer's
    attention adds there (`errors_by_head`), mean over all ranks. Of equal errors, and of those that rounding may be,
    those stay that are exact already; as long as there are no others, it looks ten times as often.

    Heads that will look far away are not there yet while `ContextWarmup` cuts rows, so that it waits until rows are
    whole.

    A checkpoint has the choice. Says each choice that differs from the one before in a line, and logs
    `muse/exact_heads_layer_*`, the number of exact heads in each layer; a training that ends without a choice says so,
    unless every layer attends exactly then.
    Chooses nothing where `model.exact_heads` is 0 or all heads.

    Args:
        every_n_steps: optimizer steps between two choices.
    Raises:
        UserError: every_n_steps is below 1.

    Example:
        >>> trainer = L.Trainer(callbacks=[ExactHeads(every_n_steps=100)])
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise UserError(f"ExactHeads: every_n_steps is {every_n_steps}; accepted: at least 1")
        self.every_n_steps = every_n_steps
        self._last_step = -1
        self._has_looked = False
        self._why_none = ""

    def state_dict(self) -> dict[str, Any]:
        """A training that goes on looks when one would that was not interrupted."""
        return {"has_looked": self._has_looked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._has_looked = state_dict["has_looked"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Another training: what the one before saw says nothing of it, and its first step may have the same number."""
        self._last_step, self._has_looked, self._why_none = -1, False, ""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Choose, before the first micro-batch of a step whose turn it is."""
        assert isinstance(pl_module, LanguageModel)
        step = trainer.global_step
        if step == self._last_step or not _attends_partly_exact(pl_module):
            return
        first = _first_whole_step(trainer, seq_len=batch["input_ids"].shape[1])
        if step < first:
            self._why_none = f"the first choice is made before step {first}"
            return
        are_chosen = pl_module.are_heads_chosen
        interval = self.every_n_steps if are_chosen else max(1, self.every_n_steps // 10)
        if (step - first) % interval and (are_chosen or self._has_looked):
            return
        self._last_step, self._has_looked = step, True
        # Callbacks run outside the precision that the step runs in.
        with trainer.precision_plugin.forward_context():
            errors = errors_by_head(pl_module.llama, batch["input_ids"], batch.get("cu_seqlens"))
        errors = trainer.strategy.reduce(errors, reduce_op="mean")
        self._why_none = _nothing_to_choose_by(errors)
        if self._why_none:
            return
        before = pl_module.chosen_heads
        choose_heads(pl_module.partly_exact, errors)
        pl_module.are_heads_chosen = True
        if pl_module.chosen_heads != before or not are_chosen:
            _say(pl_module, f"step {step}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Log how many heads of each layer the step had exact that has just ended: all, where `ExactTail` or
        `ContextWarmup` has every layer exact."""
        assert isinstance(pl_module, LanguageModel)
        if not ends_step(trainer) or not is_log_step(trainer, trainer.global_step):
            return
        is_partly = _attends_partly_exact(pl_module)
        for strategy in pl_module.partly_exact:
            count = len(strategy.heads) if is_partly else strategy.num_kv_heads
            pl_module.log(f"muse/exact_heads_layer_{strategy.layer_idx}", float(count))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so where none was chosen."""
        assert isinstance(pl_module, LanguageModel)
        if self._why_none and not pl_module.are_heads_chosen and _attends_partly_exact(pl_module):
            rank_zero_info(
                "model.exact_heads: no head was chosen; exact key-value heads by layer: "
                f"{heads_in_words(pl_module.chosen_heads)}; {self._why_none}"
            )


def _attends_partly_exact(model: LanguageModel) -> bool:
    """Whether there are exact heads beside others, and not every layer is exact now (`ExactTail`, `ContextWarmup`)."""
    return model.has_choice and any(block.self_attn.attention in model.partly_exact for block in model.llama.blocks)


def _first_whole_step(trainer: L.Trainer, seq_len: int) -> int:
    return max((warmup.whole_from(seq_len) for warmup in callbacks_of(trainer, ContextWarmup)), default=0)


def _nothing_to_choose_by(errors: Tensor) -> str:
    """Why, or nothing."""
    if not errors.isfinite().all():
        return "errors are not finite"
    if not beyond_rounding(errors).any():
        return (
            "attention erred nowhere: rows (data.seq_len), documents and pieces of rows (ContextWarmup) of at most "
            "exact_below tokens are attended exactly"
        )
    return ""


def _say(model: LanguageModel, when: str) -> None:
    rank_zero_info(f"{when}: exact key-value heads by layer: {heads_in_words(model.chosen_heads)}")
