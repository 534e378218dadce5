"""The order in which the blocks of a split are read: a pure function of a seed, at any position at once."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Order = Literal["stored", "shuffled", "reshuffled"]
"""As stored; one random order for every epoch; another random order in each epoch."""


class BlockOrder:
    """One epoch of a split: chunk after chunk, and within each its blocks, both permuted unless the order is "stored".

    Blocks of one chunk stay together, so that a reader has one file open, and of remote data one file on its disk. The
    permutation of a chunk is drawn when it is reached: memory grows with the number of chunks, not of blocks.
    """

    def __init__(self, counts: Sequence[int], order: Order, seed: int, epoch: int) -> None:
        """
        Args:
            counts: Blocks of each chunk.
            order: Of the blocks.
            seed: Of a random order.
            epoch: From 1; draws the order if that is "reshuffled".
        """
        self._counts = np.asarray(counts, dtype=np.int64)
        self._draw = None if order == "stored" else [seed, epoch if order == "reshuffled" else 0]
        self._chunks = np.arange(len(self._counts))
        if self._draw is not None:
            # RandomState, not Generator: its stream is frozen, so that an epoch's order outlives numpy releases.
            self._chunks = np.random.RandomState(self._draw).permutation(self._chunks)
        self._ends = np.cumsum(self._counts[self._chunks])
        self._opened = -1
        self._inside = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Chunk, and block within it, at a position. Positions in rising order are fastest."""
        visit = int(np.searchsorted(self._ends, position, side="right"))
        chunk = int(self._chunks[visit])
        if visit != self._opened:
            self._opened = visit
            self._inside = np.arange(self._counts[chunk])
            if self._draw is not None:
                self._inside = np.random.RandomState([*self._draw, chunk]).permutation(self._inside)
        return chunk, int(self._inside[position - (self._ends[visit] - self._counts[chunk])])

    def chunk_after(self, chunk: int) -> int | None:
        """The chunk that is read after another one; None if that is the last."""
        (visit,) = np.flatnonzero(self._chunks == chunk)
        return int(self._chunks[visit + 1]) if visit + 1 < len(self._chunks) else None
