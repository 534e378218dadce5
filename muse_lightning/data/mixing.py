"""Which block is read next, of one dataset or of several with weights: a plan whose state is a few integers.

litdata's CombinedStreamingDataset draws datasets at random in each worker, so that batches change with the number of
workers, and a resumed run lost a batch (litdata 0.2.76, any number of workers) or went wrong in a dataset's second
epoch. Here the blocks that all ranks read are one sequence, and a resumed run goes on at its position in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from muse_lightning.data.order import BlockOrder
from muse_lightning.errors import UserError

_LOTS_AT_ONCE = 1024
# Blocks: less than about two leave the turns of the datasets fixed, so that ranks differ; more makes shares rougher.
_LOT_BLOCKS = 4.0


class BlockId(NamedTuple):
    """Which block: number of the dataset in the recipe, its epoch (from 1), chunk in the card, block in the chunk."""

    dataset: int
    epoch: int
    chunk: int
    block: int


@dataclass(frozen=True)
class Part:
    """One dataset of a plan.

    Attributes:
        name: As the recipe has it.
        fingerprint: Of its content: where it lies may change.
        counts: Blocks of each chunk of the train split.
        weight: Its share of the blocks that are read, over the sum of all weights. 0: not read, its place is kept.
    """

    name: str
    fingerprint: str
    counts: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Position:
    """Where a plan stands.

    Attributes:
        epochs, offsets: Of each dataset: its epoch, from 1, and the blocks of it that were read or dropped.
        drawn: Of each dataset: blocks read since the weights were set.
        done: Blocks of this epoch of the plan that were read.
    """

    epochs: tuple[int, ...]
    offsets: tuple[int, ...]
    drawn: tuple[int, ...]
    done: int = 0


class Plan:
    """The sequence of blocks that all ranks read in training, in global batches.

    **One dataset**: an epoch is every block once, in whole global batches. What is left over at its end, less than one
    of them, is dropped; each epoch has another order, so it is dropped from another place.

    **Several**: the next block is of the dataset that is furthest behind its weight, give or take up to four blocks
    by lot. So at every step each has its share within a few blocks, and no rank gets one dataset more often than
    another rank does, as it would if they came in a fixed turn. A dataset that is used up starts its next epoch at
    once, in another order; nothing is dropped. An epoch of the plan, which counts for the trainer alone, is as many
    blocks as the datasets that are read have together.

    Source: without the lot the rule is that of Megatron-LM's blended datasets.
    """

    def __init__(self, parts: Sequence[Part], seed: int, global_batch: int) -> None:
        """
        Args:
            parts: The datasets; at least one has a weight above 0 and blocks.
            seed: Of the order of blocks, and of the lots.
            global_batch: Blocks of one batch of all ranks.
        """
        self.parts = tuple(parts)
        self.seed = seed
        self.global_batch = global_batch
        total = sum(part.weight for part in self.parts)
        self._weights = [part.weight / total for part in self.parts]
        self._lots: tuple[int, list[list[float]]] = (-1, [])
        self._orders: dict[int, tuple[int, BlockOrder]] = {}
        self._sizes = [sum(part.counts) for part in self.parts]
        self._epoch_blocks = sum(size for size, weight in zip(self._sizes, self._weights, strict=True) if weight > 0)

    def start(self) -> Position:
        """The position before the first block."""
        zeros = (0,) * len(self.parts)
        return Position(epochs=(1,) * len(self.parts), offsets=zeros, drawn=zeros)

    def batches_left(self, position: Position) -> int:
        """Whole global batches that are left of the epoch; 0 at its end."""
        return (self._epoch_blocks - position.done) // self.global_batch

    def begin(self, position: Position) -> Position:
        """The same position, or the start of the next epoch if none of this one is left."""
        if self.batches_left(position):
            return position
        if len(self.parts) > 1:
            return replace(position, done=0)
        return replace(position, epochs=(position.epochs[0] + 1,), offsets=(0,), done=0)

    def take(self, position: Position) -> tuple[list[BlockId], Position]:
        """The next global batch, and the position after it."""
        epochs, offsets, drawn = list(position.epochs), list(position.offsets), list(position.drawn)
        taken = []
        for _ in range(self.global_batch):
            index = self._next(drawn)
            if offsets[index] == self._sizes[index]:
                epochs[index], offsets[index] = epochs[index] + 1, 0
            taken.append(BlockId(index, epochs[index], *self.order(index, epochs[index])[offsets[index]]))
            offsets[index] += 1
            drawn[index] += 1
        done = position.done + self.global_batch
        return taken, Position(tuple(epochs), tuple(offsets), tuple(drawn), done)

    def epoch(self, position: Position) -> Iterator[tuple[list[BlockId], Position]]:
        """The global batches that are left of the epoch, each with the position after it."""
        for _ in range(self.batches_left(position)):
            batch, position = self.take(position)
            yield batch, position

    def order(self, index: int, epoch: int) -> BlockOrder:
        """The order of a dataset's blocks in an epoch of its own."""
        found = self._orders.get(index)
        if found is None or found[0] != epoch:
            found = epoch, BlockOrder(self.parts[index].counts, "reshuffled", self.seed, epoch)
            self._orders[index] = found
        return found[1]

    def _next(self, drawn: Sequence[int]) -> int:
        """The dataset that is furthest behind its weight."""
        if len(drawn) == 1:
            return 0
        read = sum(drawn)
        lots = self._lots_at(read)
        return max(
            (index for index, weight in enumerate(self._weights) if weight > 0),
            key=lambda index: self._weights[index] * read - drawn[index] + lots[index],
        )

    def _lots_at(self, read: int) -> list[float]:
        """A number of blocks for each dataset, for the block after `read` blocks; drawn many at a time."""
        draw, row = divmod(read, _LOTS_AT_ONCE)
        if self._lots[0] != draw:
            lots = np.random.RandomState([self.seed, draw]).random_sample((_LOTS_AT_ONCE, len(self.parts)))
            self._lots = draw, (_LOT_BLOCKS * lots).tolist()
        return self._lots[1][row]

    def to_state(self, position: Position) -> dict[str, Any]:
        """A position in plain values, by fingerprint: for a checkpoint."""
        return {
            "seed": self.seed,
            "done": position.done,
            "datasets": {
                part.fingerprint: {
                    "name": part.name,
                    "weight": part.weight,
                    "epoch": position.epochs[index],
                    "offset": position.offsets[index],
                    "drawn": position.drawn[index],
                }
                for index, part in enumerate(self.parts)
            },
        }

    def from_state(self, state: Mapping[str, Any]) -> tuple[Position, list[str]]:
        """The position that a state tells of, whatever the global batch and the weights were then.

        Returns:
            The position, and a line for each thing that differs from the saved plan and is accepted: other weights,
            which count from here on, and datasets that were not read before, which start at their first block.
        Raises:
            UserError: another seed, or a dataset that was read is not there any more.
        """
        if state["seed"] != self.seed:
            raise _refused("data.seed", self.seed, state["seed"])
        saved: Mapping[str, Mapping[str, Any]] = state["datasets"]
        known = {part.fingerprint for part in self.parts}
        gone = [entry for fingerprint, entry in saved.items() if fingerprint not in known]
        if gone and len(self.parts) == len(saved) == 1:
            ((fingerprint, _),) = saved.items()
            raise _refused("data.dataset (fingerprint)", self.parts[0].fingerprint[:12], fingerprint[:12])
        if gone:
            raise UserError(
                f"data.mixture: {', '.join(entry['name'] for entry in gone)}, which the checkpoint has read from, is "
                "not among the datasets (or its content changed); add it, with weight 0 to read no more of it"
            )
        entries = [saved.get(part.fingerprint, {}) for part in self.parts]
        notes = [
            f"data.mixture: {part.name} is new and starts at its first block"
            if not entry
            else f"data.mixture: weight of {part.name} is {part.weight:g} from here on, it was {entry['weight']:g}"
            for part, entry in zip(self.parts, entries, strict=True)
            if entry.get("weight") != part.weight
        ]
        if len(self.parts) == 1:
            notes = []  # the weight of a single dataset says nothing
        position = Position(
            epochs=tuple(entry.get("epoch", 1) for entry in entries),
            offsets=tuple(entry.get("offset", 0) for entry in entries),
            drawn=tuple(0 if notes else entry["drawn"] for entry in entries),
            done=min(state["done"], self._epoch_blocks),
        )
        return position, notes


def _refused(name: str, found: object, saved: object) -> UserError:
    return UserError(
        f"{name}: {found} found, but the checkpoint's data state was saved with {saved}; "
        "resume with that, or start a new run from the checkpoint's weights"
    )
