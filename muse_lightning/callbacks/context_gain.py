"""Does more context help? The same predictions with the whole context and with a small part of it."""

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from muse_lightning.callbacks.loss_by_position import tokens_in_sight
from muse_lightning.data.batches import IGNORED_LABEL, Batch, cut_documents
from muse_lightning.errors import UserError
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.totals import Totals


class ContextGain(L.Callback):
    """Logs `val/context_gain`, nats per token that the far context saves, at each validation.

        gain = mean over labels of (nats with at most N / pieces tokens in sight - nats with the context as it is)

    The mean is over labels that see more than N / 2 tokens of their document, N the context length; for the first term
    the same rows are cut into pieces of N / pieces tokens that do not see each other, and of their labels only those
    count that still see more than half a piece. Losses at early and at late positions are of different texts; here
    texts are the same. Above 0, the far context helps. Nothing is logged where no document is that long, and a line
    says so.

    Args:
        batches: first batches of each rank to do it on; each takes one forward pass more.
        pieces: into how many a row is cut, at least 2.
    Raises:
        UserError: a value out of range.

    Example:
        >>> trainer = L.Trainer(callbacks=[ContextGain()])
    """

    def __init__(self, batches: int = 8, pieces: int = 8) -> None:
        if batches < 1 or pieces < 2:
            raise UserError(f"ContextGain: batches is {batches}, pieces {pieces}; at least 1 and 2 are needed")
        self.batches = batches
        self.pieces = pieces
        self._totals = Totals()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from 0, on every rank: the sums are collected over all."""
        self._totals.start(2, pl_module.device)

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
        """Run the model once more on the pieces, and compare with `nats`, which the validation step returns."""
        assert isinstance(pl_module, LanguageModel)
        seq_len = batch["input_ids"].shape[1]
        length = seq_len // self.pieces
        if batch_idx >= self.batches or length < 2:
            return
        cut = {**batch, "cu_seqlens": cut_documents(cast(Batch, batch), length)}
        # Callbacks run outside the precision that the step ran in.
        with trainer.precision_plugin.forward_context():
            nats = pl_module.token_nats(cast(Batch, cut))
        compared = (
            (batch["labels"] != IGNORED_LABEL)
            & (tokens_in_sight(batch) > seq_len // 2)
            & (tokens_in_sight(cut) > length // 2)
        )
        self._totals.add(((nats - outputs["nats"]) * compared).sum(), compared.sum())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log it."""
        saved, count = self._totals.collect(trainer)
        if trainer.sanity_checking:
            return
        if not count:
            rank_zero_info("context gain: left out, no prediction sees more than half of the context and of its piece")
        else:
            pl_module.log("val/context_gain", saved / count, sync_dist=True)
