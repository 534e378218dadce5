"""What the model makes of a long context: the validation loss by the number of tokens a prediction could see."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from muse_lightning.callbacks.figures import draw_curve, write_figure
from muse_lightning.data.batches import IGNORED_LABEL
from muse_lightning.errors import UserError
from muse_lightning.model.rope import document_positions
from muse_lightning.training.log_step import written_step
from muse_lightning.training.totals import Totals


class LossByPosition(L.Callback):
    """Draws the figure `val/loss_by_position` at each validation and logs `val/loss_short` and `val/loss_long`.

    The points of the figure are logged as `val/loss_by_position/N`. A prediction at position i of its document sees i +
    1 tokens; losses are averaged over 1, 2-3, 4-7, 8-15, ... tokens in sight, over all batches and ranks; N is the
    first number of each. `val/loss_short` is the mean over predictions that see at most `short_context` tokens, which a
    long context must not spoil; `val/loss_long` that over those that see more than half the context; each is left out
    where there are none.

    Args:
        short_context: tokens.
    Raises:
        UserError: a value below 1.

    Example:
        >>> trainer = L.Trainer(callbacks=[LossByPosition()])
    """

    def __init__(self, short_context: int = 2048) -> None:
        if short_context < 1:
            raise UserError(f"LossByPosition: short_context is {short_context}; it must be at least 1 token")
        self.short_context = short_context
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
        in_sight, is_label = tokens_in_sight(batch), batch["labels"] != IGNORED_LABEL
        short = is_label & (in_sight <= self.short_context)
        long = is_label & (in_sight > in_sight.shape[1] // 2)
        ends = [value for mask in (short, long) for value in ((outputs["nats"] * mask).sum(), mask.sum())]
        self._totals.add(*nats, *counts, *ends)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and log."""
        if not self._totals:
            return
        sums = self._totals.collect(trainer)
        nats, counts = sums[: self._buckets], sums[self._buckets : 2 * self._buckets]
        short_nats, short_count, long_nats, long_count = sums[2 * self._buckets :]
        if trainer.sanity_checking:
            return
        means = {"val/loss_short": (short_nats, short_count), "val/loss_long": (long_nats, long_count)}
        pl_module.log_dict({tag: total / count for tag, (total, count) in means.items() if count}, sync_dist=True)
        points = [
            (float(2**i), total / count) for i, (total, count) in enumerate(zip(nats, counts, strict=True)) if count
        ]
        if points:
            figure = draw_curve(
                points,
                "tokens in sight, from this power of two to the next",
                "validation loss, nats per token",
                log_x=True,
            )
            write_figure(trainer, "val/loss_by_position", figure)
            # Not logged by the module: sixteen lines more on the console would hide the others.
            for logger in trainer.loggers:
                values = {f"val/loss_by_position/{start:.0f}": loss for start, loss in points}
                logger.log_metrics(values, step=written_step(trainer))


def tokens_in_sight(batch: dict[str, Tensor]) -> Tensor:
    """How many tokens each prediction sees, itself included: int64 [B, N], 1 at each document's start."""
    rows, seq_len = batch["labels"].shape
    if "cu_seqlens" in batch:
        return document_positions(batch["cu_seqlens"], rows, seq_len) + 1
    return torch.arange(1, seq_len + 1, device=batch["labels"].device).expand(rows, -1)


def sums_by_context(nats: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses by tokens in sight, in powers of two.

    Args:
        nats: [B, N], 0 where there is no label.
        batch: labels and, where documents are told apart, cu_seqlens.
    Returns:
        The sum of nats and the number of labels, each [log2(N) + 1], of predictions that see at least 2^i and less than
        2^(i + 1) tokens.
    """
    in_sight = tokens_in_sight(batch)
    is_label = batch["labels"] != IGNORED_LABEL
    # One pass per bucket and not a histogram: bincount and scatter are not deterministic on a GPU.
    masks = [
        is_label & (in_sight >= 2**i) & (in_sight < 2 ** (i + 1)) for i in range(int(math.log2(nats.shape[1])) + 1)
    ]
    return torch.stack([(nats * mask).sum() for mask in masks]), torch.stack([mask.sum() for mask in masks])
