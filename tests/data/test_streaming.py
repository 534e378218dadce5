"""Which blocks make which batch: the same for any number of workers, shared out over ranks, exactly resumed."""

import itertools
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
from litdata.utilities.env import _DistributedEnv

from muse_lightning.data import TokenDataModule
from muse_lightning.data.card import count_blocks
from muse_lightning.data.item_loader import read_block
from muse_lightning.data.streaming import BlockLoader, deal
from muse_lightning.errors import UserError

SEQ_LEN = 300  # about 35 training batches of 2 blocks


def texts(batches) -> list[list[list[int]]]:
    """Batches as comparable lists: every row's inputs."""
    return [batch["input_ids"].tolist() for batch in batches]


@pytest.fixture
def data(make_data) -> TokenDataModule:
    data = make_data(seq_len=SEQ_LEN)
    data.prepare_data()
    data.setup("fit")
    return data


def loader(data: TokenDataModule, split: str = "train", num_workers: int = 0) -> BlockLoader:
    data.num_workers = num_workers
    return data.train_dataloader() if split == "train" else data.val_dataloader()


@pytest.fixture
def on_rank(monkeypatch):
    """Makes litdata believe that this process is one rank of several."""

    def become(rank: int, world_size: int) -> None:
        monkeypatch.setattr(_DistributedEnv, "detect", lambda: _DistributedEnv(world_size, rank, 1))

    return become


def stored_blocks(data: TokenDataModule, split: str) -> list[list[int]]:
    entry = data.card.splits[split]
    blocks = range(count_blocks(entry, data.seq_len))
    stored = (read_block(data.dataset / split, entry, data.card.dtype, data.seq_len, index) for index in blocks)
    return [block.tokens[:-1].tolist() for block in stored]


@pytest.mark.parametrize("blocks", [0, 1, 7, 12, 29])
@pytest.mark.parametrize(
    ("world_size", "num_workers", "batch_size"), [(1, 1, 1), (1, 3, 2), (2, 1, 3), (2, 2, 2), (3, 2, 4)]
)
@pytest.mark.parametrize("drop_last", [True, False])
def test_deal_by_hand(blocks, world_size, num_workers, batch_size, drop_last):
    """Against a loop that hands out batches one by one."""
    queue = list(range(blocks))
    expected: dict[int, int] = {}
    turn = 0
    while queue:
        size = batch_size if len(queue) >= world_size * batch_size else (0 if drop_last else len(queue) // world_size)
        if not size:
            break
        for rank in range(world_size):
            for block in [queue.pop(0) for _ in range(size)]:
                expected[block] = rank * num_workers + turn % num_workers
        turn += 1
    worker, kept = deal(blocks, world_size, num_workers, batch_size, drop_last)
    assert kept == len(expected)
    assert worker.tolist() == [expected[block] for block in range(kept)]


def test_an_epoch_is_every_block_once_in_a_new_order(data):
    train = loader(data)
    epochs = [texts(train) for _ in range(2)]
    stored = stored_blocks(data, "train")
    for batches in epochs:
        rows = list(itertools.chain.from_iterable(batches))
        assert len(rows) == len(stored) // 2 * 2 == 2 * len(train)
        assert all(row in stored for row in rows)
        assert len({tuple(row) for row in rows}) == len(rows)
    assert epochs[0] != epochs[1]
    assert texts(loader(data)) == epochs[0]
    data.seed = 1
    assert texts(loader(data)) != epochs[0]


def test_validation_is_every_block_in_one_random_order(data):
    data.batch_size = 3
    val = loader(data, "val")
    rows = list(itertools.chain.from_iterable(texts(val)))
    stored = stored_blocks(data, "val")
    assert rows != stored
    assert sorted(rows) == sorted(stored)
    data.seed = 1
    assert texts(val) == texts(val) == texts(loader(data, "val"))
    assert len(rows) % 3 != 0, "the last batch should be a smaller one here"


def test_predict_reads_in_stored_order(data):
    data.predict_split = "train"
    rows = list(itertools.chain.from_iterable(texts(data.predict_dataloader())))
    assert rows == stored_blocks(data, "train")


def test_blocks_for_one_reader_are_what_all_ranks_read(data, on_rank):
    for blocks, split in ((data.training_blocks, "train"), (data.validation_blocks, "val")):
        ranks = []
        for rank in range(2):
            on_rank(rank, 2)
            ranks.append(texts(loader(data, split)))
        together = [row for pair in zip(*ranks, strict=True) for batch in pair for row in batch]
        found = [block.tokens[:-1].tolist() for block in blocks()]
        assert found[: len(together)] == together
        assert len(found) - len(together) < 4


@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_do_not_depend_on_the_number_of_workers(data, split):
    alone = loader(data, split)
    expected = [texts(alone) for _ in range(2)]
    for num_workers in (1, 2):
        several = loader(data, split, num_workers)
        assert [texts(several) for _ in range(2)] == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_global_batches(data, on_rank, num_workers):
    data.batch_size = 4
    one = texts(loader(data))
    data.batch_size = 2
    ranks = []
    for rank in range(2):
        on_rank(rank, 2)
        ranks.append(texts(loader(data, num_workers=num_workers)))
    assert [a + b for a, b in zip(*ranks, strict=True)] == one


def test_evaluation_gives_all_ranks_equally_many_blocks(data, on_rank):
    ranks = []
    data.batch_size = 3
    for rank in range(2):
        on_rank(rank, 2)
        ranks.append(texts(loader(data, "val")))
    sizes = [[len(batch) for batch in batches] for batches in ranks]
    assert sizes[0] == sizes[1]
    assert sizes[0][-1] < 3, "the last batch should be a smaller one here"
    rows = [row for batches in ranks for batch in batches for row in batch]
    stored = stored_blocks(data, "val")
    assert len(rows) == len(stored) // 2 * 2
    assert len({tuple(row) for row in rows}) == len(rows)
    assert all(row in stored for row in rows)


@pytest.mark.parametrize(("saved_workers", "workers"), [(0, 0), (2, 2), (0, 2), (2, 1)])
@pytest.mark.parametrize("position", [3, "second epoch"])
def test_resume_goes_on_with_the_next_batch(data, saved_workers, workers, position):
    first = loader(data, num_workers=saved_workers)
    epochs = [texts(first) for _ in range(3)]
    first = loader(data, num_workers=saved_workers)
    if position == "second epoch":
        list(first)
    done = 2 if position == "second epoch" else position
    iterator = iter(first)
    for _ in range(done):
        next(iterator)
    state = first.state_dict()

    again = loader(data, num_workers=workers)
    again.load_state_dict(state)
    epoch = 1 if position == "second epoch" else 0
    # As a Trainer does: it never asks for a batch after the last.
    rest = list(itertools.islice(again, len(again) - done))
    assert texts(rest) == epochs[epoch][done:]
    assert texts(again) == epochs[epoch + 1]


@pytest.mark.parametrize("batch_size", [2, 1, 3])
def test_resume_on_other_ranks_goes_on_in_the_same_sequence(data, on_rank, batch_size):
    """From 16 blocks seen by one rank to two ranks: whole global batches of them are not read again."""
    rows = list(itertools.chain.from_iterable(texts(loader(data))))
    first = loader(data)
    iterator = iter(first)
    for _ in range(8):
        next(iterator)
    state = first.state_dict()
    ranks = []
    data.batch_size = batch_size
    for rank in range(2):
        on_rank(rank, 2)
        again = loader(data, num_workers=1)
        again.load_state_dict(state)
        ranks.append(texts(again))
    rest = [row for pair in zip(*ranks, strict=True) for batch in pair for row in batch]
    begin = 2 * batch_size * (16 // (2 * batch_size))
    assert rest == rows[begin : begin + len(rest)]
    assert len(rows) - begin - len(rest) < 2 * batch_size


def test_resume_from_data_that_moved(data, make_data, tmp_path):
    first = loader(data)
    expected = texts(first)
    first = loader(data)
    next(iter(first))
    state = first.state_dict()
    shutil.move(data.dataset, tmp_path / "elsewhere")
    moved = make_data(dataset=tmp_path / "elsewhere", sources=None, seq_len=SEQ_LEN)
    moved.setup("fit")
    again = loader(moved)
    again.load_state_dict(state)
    assert texts(again) == expected[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, r"data.seed: 1 found, but the checkpoint's data state was saved with 0"),
        ({"seq_len": 32}, r"data.seq_len: 32 found, but .* with 300"),
        ({"prepare_seed": 1}, r"data.dataset \(fingerprint\): \w{12} found, but"),
    ],
)
def test_resume_with_other_data_is_one_line(data, make_data, arguments, message):
    first = loader(data)
    next(iter(first))
    state = first.state_dict()
    other = make_data(**{"seq_len": SEQ_LEN, **arguments})
    other.prepare_data()
    with pytest.raises(UserError, match=message):
        loader(other).load_state_dict(state)


@pytest.mark.multi_process
def test_a_killed_worker_is_an_error_and_not_a_hang(data):
    before = set(multiprocessing.active_children())
    train = loader(data, num_workers=1)
    iterator = iter(train)
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker"):
        list(iterator)


def test_order_outlives_library_releases(data):
    """The first blocks of two epochs, drawn again by numpy's frozen generator."""
    train = loader(data)
    counts = [chunk.tokens // (SEQ_LEN + 1) for chunk in data.card.splits["train"].chunks]
    stored = stored_blocks(data, "train")
    for epoch in (1, 2):
        order = np.random.RandomState([0, epoch]).permutation(len(counts))
        chunk = int(order[0])
        first = sum(counts[:chunk]) + np.random.RandomState([0, epoch, chunk]).permutation(counts[chunk])[0]
        assert texts(train)[0][0] == stored[first]
