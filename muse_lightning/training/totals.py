"""Sums over batches and ranks, from which means are exact whatever the size of each batch."""

import lightning as L
import torch
from torch import Tensor


class Totals:
    """Running sums of several numbers, on the device of what is added: adding never waits for the device.

    What is added must be of the rows that a rank has read: those that ranks share count once.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def start(self, count: int, device: torch.device) -> None:
        """Start from `count` sums of 0, for ranks that may have nothing to add."""
        self.clear()
        self.add(*torch.zeros(count, device=device))

    def add(self, *values: Tensor) -> None:
        """Add one value to each sum. Every call gives as many values, each a tensor of no dimension."""
        # Apple's GPUs have no float64.
        dtype = torch.float32 if values[0].device.type == "mps" else torch.float64
        addend = torch.stack([value.detach().to(dtype) for value in values])
        self._sums = addend if self._sums is None else self._sums + addend

    def collect(self, trainer: L.Trainer) -> list[float]:
        """The sums over all ranks since the last call, and start again from 0.

        Every rank must have added something, and every rank must call it.
        """
        if self._sums is None:
            raise ValueError("nothing was added to the totals")
        sums = trainer.strategy.reduce(self._sums, reduce_op="sum") / ranks_per_block(trainer)
        self._sums = None
        return sums.tolist()

    def clear(self) -> None:
        """Start again from 0."""
        self._sums = None

    def __bool__(self) -> bool:
        return self._sums is not None


def ranks_per_block(trainer: L.Trainer) -> int:
    """How many ranks read the same rows (`data.ranks_per_block`)."""
    return getattr(getattr(trainer, "datamodule", None), "ranks_per_block", 1)
