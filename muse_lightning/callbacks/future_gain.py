"""Does a prediction profit from what comes after it? The same predictions with another text behind them."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from muse_lightning.data.batches import IGNORED_LABEL
from muse_lightning.errors import UserError
from muse_lightning.measure.token_scores import token_scores
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.totals import Totals


class FutureGain(L.Callback):
    """Logs `val/future_gain`, nats per token that sight of the tokens behind it saves, at each validation.

        gain = mean over sampled tokens of (nats with another text behind the token before - nats in the row as it is)

    Exact attention is causal: 0. MuSe's clusters of queries, and which keys they retrieve, depend on later tokens of
    the same chunk (docs/attention.md, "Causality, stated exactly"). What that saves is in `val/loss` but can be had by
    nobody who generates text: a gain of more than a few of its standard errors is no success of the attention.

    Sampled are labels of the second half of each row, where there is far context; the text behind is that of the batch
    before, in the same places, documents staying where they are. The first batch of a rank is that of the second alone.

        val/future_gain         nats per token
        val/future_gain_error   its standard error over tokens

    Args:
        batches: batches of each rank to do it on, after the first.
        tokens: of each row; each takes one forward pass of the batch.
        seed: of the sample.
    Raises:
        UserError: a value below 1.

    Example:
        >>> trainer = L.Trainer(callbacks=[FutureGain()])
    """

    def __init__(self, batches: int = 8, tokens: int = 16, seed: int = 0) -> None:
        if batches < 1 or tokens < 1:
            raise UserError(f"FutureGain: batches is {batches}, tokens {tokens}; both must be at least 1")
        self.batches = batches
        self.tokens = tokens
        self.seed = seed
        self._totals = Totals()
        self._before: Tensor | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from 0, on every rank: the sums are collected over all."""
        self._totals.clear()
        self._totals.add(*torch.zeros(3, device=pl_module.device))
        self._before = None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the model once for each sampled token, and compare with `nats`, which the validation step returns."""
        assert isinstance(pl_module, LanguageModel)
        input_ids, labels = batch["input_ids"], batch["labels"]
        before, self._before = self._before, input_ids
        if before is None or before.shape != input_ids.shape or batch_idx > self.batches:
            return
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        is_candidate = (labels != IGNORED_LABEL) & (places >= len(places) // 2)
        row = is_candidate.any(1).nonzero()[:, 0]
        if not len(row):
            return
        generator = torch.Generator().manual_seed(self.seed + batch_idx)
        drawn = is_candidate[row].float().cpu().multinomial(self.tokens, replacement=True, generator=generator)
        for at in drawn.T.to(input_ids.device):
            changed = input_ids.clone()
            changed[row] = torch.where(places <= at[:, None], input_ids[row], before[row])
            # Callbacks run outside the precision that the step ran in.
            with trainer.precision_plugin.forward_context():
                hidden = pl_module.llama.hidden_states(changed, cu_seqlens=batch.get("cu_seqlens"))
                nats, _ = token_scores(hidden[row, at], pl_module.llama.lm_head.weight, labels[row, at])
            saved = (nats - outputs["nats"][row, at]).double()
            self._totals.add(saved.sum(), (saved**2).sum(), torch.ones_like(saved).sum())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log it."""
        saved, squares, count = self._totals.collect(trainer)
        self._before = None
        if trainer.sanity_checking:
            return
        if count < 2:
            rank_zero_info("future gain: left out, it takes a second validation batch and tokens in its second half")
            return
        mean = saved / count
        error = (max(0.0, squares / count - mean**2) / (count - 1)) ** 0.5
        pl_module.log_dict({"val/future_gain": mean, "val/future_gain_error": error}, sync_dist=True)
