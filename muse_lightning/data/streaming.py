"""Batches of blocks, read ahead by worker processes: for training by a plan that can be resumed, for evaluation every
block once.

litdata's StreamingDataset deals whole chunks out to workers, so that batches change with their number; it reads no
tokens from hf://, cannot give several ranks the same block, and its loader's state was lost where Lightning restores
none (at the end of an epoch, with max_epochs). Here ids of blocks are dealt out, batch by batch, by torch's DataLoader:
it keeps their order for any number of workers, and the state is a position in the plan.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from muse_lightning.data.batches import Batch, Collate
from muse_lightning.data.block_reader import Block, BlockReader
from muse_lightning.data.mixing import BlockId, Plan, Position
from muse_lightning.data.order import BlockOrder, Order
from muse_lightning.data.remote import CachedChunks
from muse_lightning.data.workers import DataWorkerError, death_of_worker, outlive_preemption
from muse_lightning.errors import UserError


@dataclass(frozen=True)
class Share:
    """Which part of every global batch is this process's.

    Attributes:
        readers: How many parts there are.
        reader: Which is ours. Ranks of the same reader read the same blocks.
    """

    readers: int = 1
    reader: int = 0

    @classmethod
    def of(cls, rank: int, world_size: int, ranks_per_block: int) -> "Share":
        """Every `ranks_per_block` ranks that follow each other read the same.

        Raises:
            UserError: the ranks do not come out even.
        """
        if world_size % ranks_per_block:
            raise UserError(
                f"data.ranks_per_block: {ranks_per_block} found, a divisor of the {world_size} ranks expected"
            )
        return cls(world_size // ranks_per_block, rank // ranks_per_block)


class BlockLoader:
    """Batches from ids of blocks. The base of the two loaders below.

    Not itself a torch DataLoader: Lightning would replace the sampler of one.
    """

    def __init__(self, reader: BlockReader, collate: Collate, num_workers: int) -> None:
        """
        Args:
            reader: Reads a block by its id.
            collate: Blocks to a batch.
            num_workers: Processes that read; 0 reads in this one.
        """
        self.reader = reader
        self._collate = collate
        self._num_workers = num_workers
        # The libraries that talk to object stores have threads, which a forked process would wait for in vain.
        is_remote = any(isinstance(split.chunks, CachedChunks) for split in reader.splits)
        self._start_method = "forkserver" if is_remote and num_workers else None
        if self._start_method:
            # Once for all workers, not in each.
            get_context("forkserver").set_forkserver_preload([__name__])

    def _read(self, batches: Iterable[Sequence[BlockId]]) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self.reader,
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists, read once
            num_workers=self._num_workers,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=self._start_method,
            worker_init_fn=outlive_preemption,
            # Of its own, or every epoch and validation would draw a number from the generator of the training: a run
            # that resumes behind one of them would have drawn more or fewer.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except UserError as error:
            if not self._num_workers:
                raise
            # torch raises a worker's error again with its whole traceback as the message. The traceback here would keep
            # the queues to the workers until the cyclic collector frees them, in an order in which torch cannot tell
            # the workers to end and waits for each of them for five seconds.
            message = str(error).strip().rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
            raise UserError(message) from error.with_traceback(None)
        except (ConnectionError, EOFError, RuntimeError) as error:
            # The first two are what torch lets through when a worker dies while a batch is being handed over.
            if isinstance(error, RuntimeError) and death_of_worker(error) is None:
                raise
            raise DataWorkerError from error.with_traceback(None)


class EvaluationLoader(BlockLoader):
    """Every block of a split once, of several datasets in one order; without state.

    Batches go to the readers in turn. What the last whole global batch leaves is one smaller batch for each, equal for
    all: less than a block for each reader is left out.
    """

    def __init__(
        self,
        reader: BlockReader,
        collate: Collate,
        num_workers: int,
        *,
        batch_size: int,
        share: Share,
        order: Order,
    ) -> None:
        super().__init__(reader, collate, num_workers)
        self._batch_size = batch_size
        self._share = share
        # A validation is the same one in runs of several seeds.
        self._orders = [BlockOrder(split.counts(reader.seq_len), order, seed=0, epoch=1) for split in reader.splits]
        sizes = [len(of_one) for of_one in self._orders]
        self._datasets = np.repeat(np.arange(len(sizes)), sizes)
        self._offsets = np.concatenate([np.arange(size) for size in sizes])
        if order != "stored":
            # Datasets take turns by their sizes, so that the first batches are of all of them.
            by_share = np.argsort((self._offsets + 0.5) / np.repeat(sizes, sizes), kind="stable")
            self._datasets, self._offsets = self._datasets[by_share], self._offsets[by_share]

    def __len__(self) -> int:
        of_reader = len(self._offsets) // self._share.readers
        return -(-of_reader // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._read([self._id(position) for position in positions] for positions in self._positions())

    def blocks(self) -> Iterator[Block]:
        """The blocks that all readers together read, in order."""
        positions = range(len(self._offsets) // self._share.readers * self._share.readers)
        return (self.reader[self._id(position)] for position in positions)

    def _positions(self) -> Iterator[range]:
        readers, reader = self._share.readers, self._share.reader
        whole, left = divmod(len(self._offsets) // readers, self._batch_size)
        for batch in range(whole):
            first = (batch * readers + reader) * self._batch_size
            yield range(first, first + self._batch_size)
        if left:
            first = whole * readers * self._batch_size + reader * left
            yield range(first, first + left)

    def _id(self, position: int) -> BlockId:
        dataset = int(self._datasets[position])
        return BlockId(dataset, 1, *self._orders[dataset][int(self._offsets[position])])


class TrainLoader(BlockLoader):
    """The batches of a plan, epoch after epoch. Its state is the position after the last batch that was handed out,
    whatever the workers have read ahead.

    An iteration goes on where the last one stopped, to the end of the epoch of the plan.

    Attributes:
        batches_read: Batches handed out since the first step of the run, by this rank.
    """

    def __init__(
        self,
        reader: BlockReader,
        collate: Collate,
        num_workers: int,
        *,
        plan: Plan,
        batch_size: int,
        share: Share,
    ) -> None:
        super().__init__(reader, collate, num_workers)
        self.plan = plan
        self._batch_size = batch_size
        self._share = share
        self._position = plan.start()
        self.batches_read = 0
        # Batches of this epoch that the trainer has counted, and whether that was before a resume.
        self._counted = 0
        self._is_resuming = False
        self._restored: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Batches of this epoch, those before a resume included: a trainer that resumes has counted them."""
        position = self.plan.begin(self._position)
        counted = self._counted if position == self._position else 0
        return counted + self.plan.batches_left(position)

    def __iter__(self) -> Iterator[Batch]:
        if not self._is_resuming:
            self._counted = 0
        self._is_resuming = False
        return self._iterate()

    def _iterate(self) -> Iterator[Batch]:
        # Here and not in __iter__: Lightning may ask for an iterator long before it uses it.
        begin = self.plan.begin(self._position)
        if begin != self._position:
            self._position, self._counted = begin, 0
        ahead: deque[Position] = deque()
        with Prefetch(self.reader, self.plan) as prefetch:
            for batch in self._read(self._ids(ahead, prefetch.see)):
                self._position = ahead.popleft()
                self._counted += 1
                self.batches_read += 1
                yield batch

    def _ids(self, ahead: deque[Position], see: Callable[[BlockId], None]) -> Iterator[list[BlockId]]:
        first = self._share.reader * self._batch_size
        for batch, position in self.plan.epoch(self._position):
            mine = batch[first : first + self._batch_size]
            for which in mine:
                see(which)
            ahead.append(position)
            yield mine

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, in plain values. The same on all ranks."""
        return {
            "seq_len": self.reader.seq_len,
            "batches_read": self.batches_read,
            "counted": self._counted,
            "plan": self.plan.to_state(self._position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the blocks that a state has seen, on any number of ranks and workers and with any batch size.

        Raises:
            UserError: the state is of other data, another seed or another context.
        """
        if state["seq_len"] != self.reader.seq_len:
            raise UserError(
                f"data.seq_len: {self.reader.seq_len} found, but the checkpoint's data state was saved with "
                f"{state['seq_len']}; resume with that, or start a new run from the checkpoint's weights"
            )
        self._position, notes = self.plan.from_state(state["plan"])
        # Lightning restores the loader once more, after the data module has.
        for note in notes if state != self._restored else ():
            rank_zero_info(note)
        self._restored = state
        self.batches_read = state["batches_read"]
        self._counted = state["counted"]
        self._is_resuming = True


class Prefetch:
    """Fetches the chunks that a plan reads next, so that workers find them there. For local files there is nothing to
    do, and a failure is left to the worker that needs the file."""

    def __init__(self, reader: BlockReader, plan: Plan) -> None:
        self._reader = reader
        self._plan = plan
        self._seen: dict[int, tuple[int, int]] = {}
        # Two chunks of each dataset, or the one that is read would make room for the next.
        needed = 2 * sum(max(chunk.size_bytes for chunk in split.entry.chunks) for split in reader.splits)
        caches = [split.chunks.cache for split in reader.splits if isinstance(split.chunks, CachedChunks)]
        self._has_room = all(cache.max_bytes >= needed for cache in caches)
        # Its threads start with the first file that is fetched: none where all is local.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prefetch")

    def see(self, which: BlockId) -> None:
        """Note that a block is about to be read: the first one of a chunk starts the fetching of the next chunk."""
        chunks = self._reader.splits[which.dataset].chunks
        if not isinstance(chunks, CachedChunks) or self._seen.get(which.dataset) == (which.epoch, which.chunk):
            return
        self._seen[which.dataset] = which.epoch, which.chunk
        following = self._plan.order(which.dataset, which.epoch).chunk_after(which.chunk) if self._has_room else None
        for chunk in [which.chunk] if following is None else [which.chunk, following]:
            self._threads.submit(chunks.fetch, self._reader.splits[which.dataset].entry.chunks[chunk])

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
