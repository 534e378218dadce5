"""litdata's streaming of one split, in an order that does not depend on the number of data workers.

litdata deals whole chunks out to workers, so that its batches change with their number. Here the blocks of an epoch
form one sequence; its batches go to ranks and, within a rank, to workers in turn, which is also how litdata re-deals
them when a run is resumed on other numbers of ranks and workers. Everything else (reading, worker processes, the exact
state) is litdata's.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming import Cache
from litdata.streaming.shuffle import Shuffle
from litdata.utilities.env import _DistributedEnv

from muse_lightning.data.card import SplitEntry
from muse_lightning.data.item_loader import TokensLoader
from muse_lightning.errors import UserError

Order = Literal["stored", "shuffled", "reshuffled"]
"""As stored; one random order for every epoch; another random order in each epoch."""


class BlockOrder(Shuffle):
    """The order of blocks, and which rank and worker reads each.

    An epoch's sequence: chunks, and within each its blocks, both permuted unless the order is "stored". What is left
    over by whole global batches (`drop_last`), or else by equal numbers of blocks for all ranks, is dropped.
    """

    def __init__(self, cache: Cache, seed: int, drop_last: bool, order: Order) -> None:
        super().__init__(cache, seed, drop_last)
        self.order = order
        # Blocks of each chunk in the order that __call__ translates to: all of one worker together, then the next
        # worker's.
        self._dealt: dict[int, np.ndarray] = {}

    def sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunk index and block index (counted over all chunks) of every block of an epoch, int64."""
        intervals = self.cache.get_chunk_intervals()
        chunks = np.arange(len(intervals))
        draw = epoch if self.order == "reshuffled" else 0
        if self.order != "stored":
            # RandomState, not Generator: its stream is frozen, so that an epoch's order outlives numpy releases.
            chunks = np.random.RandomState([self.seed, draw]).permutation(chunks)
        blocks = []
        for chunk in chunks:
            inside = np.arange(intervals[chunk][1], intervals[chunk][2])
            if self.order != "stored":
                inside = np.random.RandomState([self.seed, draw, chunk]).permutation(inside)
            blocks.append(inside)
        return np.repeat(chunks, [len(inside) for inside in blocks]), np.concatenate(blocks)

    def get_chunks_and_intervals_per_workers(
        self, distributed_env: _DistributedEnv, num_workers: int, batch_size: int, current_epoch: int
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Per worker (rank * num_workers + worker): the chunks it visits, and an interval of `_dealt` for each
        visit."""
        chunks, blocks = self.sequence(current_epoch)
        world_size = distributed_env.world_size
        worker, kept = deal(len(chunks), world_size, num_workers, batch_size, self.drop_last)
        chunks, blocks = chunks[:kept], blocks[:kept]
        intervals = self.cache.get_chunk_intervals()
        workers_chunks: list[list[int]] = [[] for _ in range(world_size * num_workers)]
        workers_intervals: list[list[list[int]]] = [[] for _ in range(world_size * num_workers)]
        self._dealt = {}
        # The sequence visits one chunk after the other.
        borders = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), kept] if kept else []
        for low, high in pairwise(borders):
            chunk = int(chunks[low])
            by_worker = np.argsort(worker[low:high], kind="stable")
            self._dealt[chunk] = blocks[low:high][by_worker]
            owners, counts = np.unique(worker[low:high], return_counts=True)
            begin, _, _, end = intervals[chunk]
            first = begin
            for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
                workers_chunks[owner].append(chunk)
                workers_intervals[owner].append([begin, first, first + count, end])
                first += count
        return workers_chunks, workers_intervals

    def __call__(self, array: np.ndarray, num_chunks: int, current_epoch: int, chunk_index: int) -> list[int]:
        """Blocks of one visit, from its positions in the last dealing."""
        begin = self.cache.get_chunk_intervals()[chunk_index][0]
        return self._dealt[chunk_index][array - begin].tolist()


def deal(blocks: int, world_size: int, num_workers: int, batch_size: int, drop_last: bool) -> tuple[np.ndarray, int]:
    """Deal a sequence of blocks out in batches: to ranks in turn, within a rank to workers in turn.

    Returns:
        The worker (rank * num_workers + worker) of each block that is kept, int64, and how many are kept: the first
        ones. Without `drop_last` the blocks after the last whole global batch are one smaller batch per rank, equal on
        all ranks.
    """
    global_batch = world_size * batch_size
    whole = blocks // global_batch * global_batch
    kept = whole if drop_last else blocks // world_size * world_size
    position = np.arange(kept)
    batch = position // batch_size
    rank, turn = batch % world_size, batch // world_size
    if kept > whole:
        rank[whole:] = (position[whole:] - whole) // ((kept - whole) // world_size)
    return rank * num_workers + turn % num_workers, kept


class BlockDataset(StreamingDataset):
    """Blocks of one split of a prepared dataset."""

    def __init__(
        self,
        folder: Path,
        entry: SplitEntry,
        seq_len: int,
        *,
        seed: int,
        order: Order,
        drop_last: bool,
        fingerprint: str,
    ) -> None:
        """
        Args:
            folder: The split's folder.
            entry: Its entry in the card.
            seq_len: Context; blocks have one token more.
            seed: Of a random order.
            order: Of the blocks.
            drop_last: Whether only whole global batches are read.
            fingerprint: The dataset's, kept in the state: data that was moved is still the same data.
        """
        super().__init__(
            str(folder),
            item_loader=TokensLoader(seq_len + 1, entry),
            shuffle=order == "reshuffled",
            seed=seed,
        )
        self.order = order
        # Afterwards: the base class warns of not dropping in a distributed run, because its own ranks would get unequal
        # numbers of blocks.
        self.drop_last = drop_last
        self._fingerprint = fingerprint

    def _create_shuffler(self, cache: Cache) -> Shuffle:
        return BlockOrder(cache, self.seed, self.drop_last, self.order)

    def state_dict(self, num_samples_yielded: int, num_workers: int, batch_size: int) -> dict[str, Any]:
        state = super().state_dict(num_samples_yielded, num_workers, batch_size)
        return {**state, "fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            UserError: it was saved with other data, another seed or another context.
        """
        block_size = state_dict["item_loader"]["block_size"]
        for name, saved, current in (
            ("data.dataset (fingerprint)", state_dict["fingerprint"][:12], self._fingerprint[:12]),
            ("data.seed", state_dict["seed"], self.seed),
            ("data.seq_len", block_size - 1, self.item_loader.state_dict()["block_size"] - 1),
        ):
            if saved != current:
                raise UserError(
                    f"{name}: {current} found, but the checkpoint's data state was saved with {saved}; "
                    "resume with that, or start a new run from the checkpoint's weights"
                )
        super().load_state_dict({**state_dict, "input_dir_path": self.input_dir.path})


class BlockLoader(StreamingDataLoader):
    """litdata's loader, exact on other numbers of ranks and workers, and with a worker's UserError as one line."""

    restore: bool

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on after the batches that a state has seen.

        The state is restated for the ranks, workers and batch size of this run: the sequence of blocks depends on none
        of them. litdata's own way of re-dealing cuts the rest of the epoch to whole batches of all workers, and would
        lose the last ones. Where the global batch changed and the position is inside a new one, that one is read from
        its start.

        Raises:
            UserError: the state is of other data, another seed or another context.
        """
        saved = obj["dataset"]
        world_size = self.dataset.distributed_env.world_size
        workers = max(self.num_workers, 1)
        batches = saved["num_samples_yielded"] * saved["world_size"] // (world_size * self.batch_size)
        samples = batches * self.batch_size
        state = {
            **saved,
            "num_samples_yielded": samples,
            "sample_in_epoch": samples * world_size,
            "world_size": world_size,
            "num_workers": workers,
            "batch_size": self.batch_size,
        }
        super().load_state_dict(
            {**obj, "dataset": state, "num_samples_yielded": samples, "latest_worker_idx": (batches - 1) % workers}
        )

    def __iter__(self) -> Iterator[Any]:
        left = len(self) - (self._num_samples_yielded_streaming // self.batch_size if self.restore else 0)
        try:
            for batch in super().__iter__():
                left -= 1
                if left == 0:
                    # Lightning knows the length and asks for nothing after the last batch. litdata, which ends a
                    # resume only when it is asked, would go on from the checkpoint again instead of starting the next
                    # epoch.
                    self.restore = False
                yield batch
        except UserError as error:
            # torch raises a worker's error again with its whole traceback as the message.
            message = str(error).strip().rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
            raise UserError(message) from error
        except (ConnectionError, EOFError) as error:
            # What torch lets through when a worker dies while a batch is being handed over.
            raise RuntimeError("a data worker died: killed, or out of memory; try fewer data.num_workers") from error
