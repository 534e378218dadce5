"""What the model makes of a long context: the validation loss by the number of tokens a prediction could see."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from muse_lightning.model.rope import document_positions
from muse_lightning.training.loss import IGNORED_LABEL
from muse_lightning.training.totals import Totals


class LossByPosition(L.Callback):
    """Draws the figure `val/loss_by_position` at each validation.

    A prediction at position i of its document sees i + 1 tokens; losses are averaged over 1, 2-3, 4-7, 8-15, ... tokens
    in sight, over all batches and ranks.

    Example:
        >>> trainer = L.Trainer(callbacks=[LossByPosition()])
    """

    def __init__(self) -> None:
        self._totals = Totals()
        self._buckets = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the losses of a batch, which the validation step returns as `nats`."""
        nats, counts = sums_by_context(outputs["nats"], batch)
        self._buckets = len(nats)
        self._totals.add(*nats, *counts)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw it."""
        if not self._totals:
            return
        sums = self._totals.collect(trainer)
        nats, counts = sums[: self._buckets], sums[self._buckets :]
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        points = [(2**i, total / count) for i, (total, count) in enumerate(zip(nats, counts, strict=True)) if count]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and points:
                logger.experiment.add_figure("val/loss_by_position", draw(points), trainer.global_step)


def sums_by_context(nats: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses by tokens in sight, in powers of two.

    Args:
        nats: [B, N], 0 where there is no label.
        batch: labels and, where documents are told apart, cu_seqlens.
    Returns:
        The sum of nats and the number of labels, each [log2(N) + 1], of predictions that see at least 2^i and less than
        2^(i + 1) tokens.
    """
    rows, seq_len = nats.shape
    if "cu_seqlens" in batch:
        positions = document_positions(batch["cu_seqlens"], rows, seq_len)
    else:
        positions = torch.arange(seq_len, device=nats.device).expand(rows, -1)
    is_label = batch["labels"] != IGNORED_LABEL
    # One pass per bucket and not a histogram: bincount and scatter are not deterministic on a GPU.
    masks = [
        is_label & (positions + 1 >= 2**i) & (positions + 1 < 2 ** (i + 1)) for i in range(int(math.log2(seq_len)) + 1)
    ]
    return torch.stack([(nats * mask).sum() for mask in masks]), torch.stack([mask.sum() for mask in masks])


def draw(points: list[tuple[int, float]]) -> Figure:
    """The curve through (tokens in sight, mean nats)."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens in sight, from this power of two to the next")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    return figure
