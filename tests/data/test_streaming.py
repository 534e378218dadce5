"""Which blocks make which batch: the same for any number of workers, shared out over ranks, exactly resumed."""

import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from muse_lightning.data import TokenDataModule, streaming
from muse_lightning.data.block_reader import read_block
from muse_lightning.data.card import count_blocks
from muse_lightning.data.prepared import MixtureEntry
from muse_lightning.data.streaming import TrainLoader
from muse_lightning.data.workers import DataWorkerError
from muse_lightning.errors import UserError

SEQ_LEN = 300  # about 30 training batches of 2 blocks


def texts(batches) -> list[list[list[int]]]:
    """Batches as comparable lists: every row's inputs."""
    return [batch["input_ids"].tolist() for batch in batches]


def records(batches) -> list[str]:
    """Batches by hash and ids of their blocks."""
    return [batch["record"] for batch in batches]


def rows_of(batches: list[list[list[int]]]) -> list[list[int]]:
    return list(itertools.chain.from_iterable(batches))


@pytest.fixture
def data(prepared) -> TokenDataModule:
    return module(prepared)


@pytest.fixture
def mixed(prepared, other_prepared) -> TokenDataModule:
    return mixture(prepared, other_prepared)


def module(dataset: Path | None, **arguments) -> TokenDataModule:
    place = None if dataset is None else str(dataset)
    data = TokenDataModule(place, **{"seq_len": SEQ_LEN, "batch_size": 2, **arguments})
    data.setup("fit")
    return data


def mixture(*datasets: Path, weights=(0.7, 0.3), **arguments) -> TokenDataModule:
    entries = [MixtureEntry(str(dataset), weight) for dataset, weight in zip(datasets, weights, strict=True)]
    return module(None, mixture=entries, **arguments)


def test_what_changed_at_a_resume_is_told_once(prepared, other_prepared, monkeypatch):
    """A trainer restores the loader after the data module has."""
    told: list[str] = []
    monkeypatch.setattr(streaming, "rank_zero_info", told.append)
    state = mixture(prepared, other_prepared).train_dataloader().state_dict()
    data = mixture(prepared, other_prepared, weights=(0.5, 0.5))
    data.load_state_dict({"train": state})
    loader = data.train_dataloader()
    assert len(told) == 2
    loader.load_state_dict(dict(state))
    assert len(told) == 2


@pytest.fixture
def on_rank(monkeypatch):
    """Makes data modules believe that this process is one rank of several."""

    def become(rank: int, world_size: int) -> None:
        monkeypatch.setattr(TokenDataModule, "_rank", rank)
        monkeypatch.setattr(TokenDataModule, "_world_size", world_size)

    return become


def stored_blocks(data: TokenDataModule, split: str) -> list[list[int]]:
    entry = data.card.splits[split]
    blocks = range(count_blocks(entry, data.seq_len))
    stored = (read_block(data.dataset / split, entry, data.card.dtype, data.seq_len, index) for index in blocks)
    return [block.tokens[:-1].tolist() for block in stored]


def test_an_epoch_is_every_block_once_in_a_new_order(data):
    train = data.train_dataloader()
    epochs = [texts(train) for _ in range(2)]
    stored = stored_blocks(data, "train")
    for batches in epochs:
        rows = rows_of(batches)
        assert len(rows) == len(stored) // 2 * 2 == 2 * len(train)
        assert all(row in stored for row in rows)
        assert len({tuple(row) for row in rows}) == len(rows)
    assert epochs[0] != epochs[1]
    assert texts(data.train_dataloader()) == epochs[0]
    data.seed = 1
    assert texts(data.train_dataloader()) != epochs[0]


def test_validation_is_every_block_in_one_random_order(data):
    data.batch_size = 4
    val = data.val_dataloader()
    batches = texts(val)
    rows, stored = rows_of(batches), stored_blocks(data, "val")
    assert rows != stored
    assert sorted(rows) == sorted(stored)
    assert len(batches) == len(val)
    data.seed = 1
    assert texts(val) == batches == texts(data.val_dataloader())
    assert len(batches[-1]) < 4, "the last batch should be a smaller one here"


def test_predict_reads_in_stored_order(data):
    data.predict_split = "train"
    assert rows_of(texts(data.predict_dataloader())) == stored_blocks(data, "train")


def test_blocks_for_one_reader_are_what_all_ranks_read(data, on_rank):
    for blocks, loader in (
        (data.training_blocks, data.train_dataloader),
        (data.validation_blocks, data.val_dataloader),
    ):
        ranks = []
        for rank in range(2):
            on_rank(rank, 2)
            ranks.append(texts(loader()))
        together = rows_of([row for pair in zip(*ranks, strict=True) for row in pair])
        found = [block.tokens[:-1].tolist() for block in blocks()]
        assert found == together


@pytest.mark.parametrize("kind", ["data", "mixed"])
def test_batches_do_not_depend_on_the_number_of_workers(kind, request):
    data = request.getfixturevalue(kind)
    val, train = texts(data.val_dataloader()), data.train_dataloader()
    expected = [records(train) for _ in range(2)]
    for data.num_workers in (1, 2):
        several = data.train_dataloader()
        assert [records(several) for _ in range(2)] == expected
        assert texts(data.val_dataloader()) == val


@pytest.mark.parametrize("kind", ["data", "mixed"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_global_batches(kind, num_workers, request, on_rank):
    data = request.getfixturevalue(kind)
    data.batch_size = 4
    one = texts(data.train_dataloader())
    data.batch_size, data.num_workers = 2, num_workers
    ranks = []
    for rank in range(2):
        on_rank(rank, 2)
        ranks.append(texts(data.train_dataloader()))
    assert [a + b for a, b in zip(*ranks, strict=True)] == one


def test_ranks_that_share_a_sequence_read_the_same_blocks(prepared, on_rank):
    on_rank(0, 2)
    data = module(prepared, ranks_per_block=2, batch_size=4)
    one, val = texts(data.train_dataloader()), texts(data.val_dataloader())
    data.batch_size = 2
    ranks, validated = [], []
    for rank in range(4):
        on_rank(rank, 4)
        ranks.append(texts(data.train_dataloader()))
        validated.append(texts(data.val_dataloader()))
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    assert [a + b for a, b in zip(ranks[0], ranks[2], strict=True)] == one
    assert validated[0] == validated[1] != validated[2] == validated[3]
    assert len(rows_of(validated[0] + validated[2])) == len(rows_of(val)) // 2 * 2
    on_rank(0, 3)
    with pytest.raises(UserError, match=r"data.ranks_per_block: 2 found, a divisor of the 3 ranks expected"):
        data.train_dataloader()


def test_evaluation_gives_all_ranks_equally_many_blocks(data, on_rank):
    ranks = []
    data.batch_size = 3
    for rank in range(2):
        on_rank(rank, 2)
        ranks.append(texts(data.val_dataloader()))
        assert len(data.val_dataloader()) == len(ranks[-1])
    sizes = [[len(batch) for batch in batches] for batches in ranks]
    assert sizes[0] == sizes[1]
    assert sizes[0][-1] < 3, "the last batch should be a smaller one here"
    rows = rows_of(ranks[0] + ranks[1])
    stored = stored_blocks(data, "val")
    assert len(rows) == len(stored) // 2 * 2
    assert len({tuple(row) for row in rows}) == len(rows)
    assert all(row in stored for row in rows)


def test_a_mixture_is_validated_on_every_block_of_all(mixed, prepared, other_prepared):
    rows = rows_of(texts(mixed.val_dataloader()))
    both = [stored_blocks(module(dataset), "val") for dataset in (prepared, other_prepared)]
    assert sorted(rows) == sorted(both[0] + both[1])
    for number in range(1, len(rows) + 1):
        share = sum(row in both[0] for row in rows[:number]) / number
        assert abs(share - len(both[0]) / len(rows)) <= 1 / number, "the first batches are of one dataset"


def interrupted(train: TrainLoader, batches: int) -> tuple[list[str], dict]:
    """The first batches of a loader, read over the ends of epochs, and the state then."""
    seen: list[str] = []
    while len(seen) < batches:
        seen += records(itertools.islice(train, batches - len(seen)))
    return seen, pickle.loads(pickle.dumps(train.state_dict()))


@pytest.mark.parametrize(
    ("kind", "saved_workers", "workers"),
    [("data", 0, 0), ("mixed", 0, 0), ("data", 2, 0), ("data", 0, 2), ("mixed", 2, 1)],
)
def test_resume_goes_on_with_the_next_batch(kind, saved_workers, workers, request):
    data = request.getfixturevalue(kind)
    length = len(data.train_dataloader())
    expected, _ = interrupted(data.train_dataloader(), 3 * length)
    # In the first epoch, one before its end, at its end, after it, in the second; fewer where processes must start.
    for stop in (1, length - 1, length, length + 1, length + 7)[:: 1 if saved_workers == workers else 3]:
        data.num_workers = saved_workers
        seen, state = interrupted(data.train_dataloader(), stop)
        data.num_workers = workers
        again = data.train_dataloader()
        again.load_state_dict(state)
        assert len(again) == length
        assert seen + interrupted(again, length)[0] == expected[: stop + length]
        assert again.batches_read == stop + length


@pytest.mark.parametrize("kind", ["data", "mixed"])
@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 2), (2, 1), (3, 1), (1, 5)])
def test_resume_on_other_ranks_repeats_and_loses_nothing(kind, ranks, batch_size, request, on_rank):
    """From 16 blocks seen by one rank."""
    data = request.getfixturevalue(kind)
    data.batch_size = 1
    sequence = rows_of(texts(data.train_dataloader()))
    data.batch_size = 2
    _, state = interrupted(data.train_dataloader(), 8)
    data.batch_size = batch_size
    together = []
    for rank in range(ranks):
        on_rank(rank, ranks)
        again = data.train_dataloader()
        again.load_state_dict(state)
        length = len(again)
        batches = texts(again)
        assert length == 8 + len(batches), "a trainer has counted 8"
        together.append(batches)
    rest = rows_of([batch for step in zip(*together, strict=True) for batch in step])
    assert rest == sequence[16 : 16 + len(rest)]
    assert len(sequence) - 16 - len(rest) < ranks * batch_size


def test_a_loader_that_is_left_early_goes_on_where_it_was(data):
    """As with trainer.limit_train_batches: no block is read again before the others were."""
    expected = records(data.train_dataloader())
    train = data.train_dataloader()
    first = records(itertools.islice(train, 5))
    assert len(train) == len(expected)
    rest = iter(train)
    assert len(train) == len(expected) - 5
    assert first + records(rest) == expected


def test_resume_from_data_that_moved(prepared, tmp_path):
    first = module(prepared).train_dataloader()
    expected, _ = interrupted(first, 10)
    _, state = interrupted(module(prepared).train_dataloader(), 4)
    shutil.copytree(prepared, tmp_path / "elsewhere")
    again = module(tmp_path / "elsewhere").train_dataloader()
    again.load_state_dict(state)
    assert interrupted(again, 6)[0] == expected[4:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, r"data.seed: 1 found, but the checkpoint's data state was saved with 0"),
        ({"seq_len": 32}, r"data.seq_len: 32 found, but .* with 300"),
        ({"other": True}, r"data.dataset \(fingerprint\): \w{12} found, but"),
    ],
)
def test_resume_with_other_data_is_one_line(prepared, other_prepared, arguments, message):
    _, state = interrupted(module(prepared).train_dataloader(), 1)
    other = module(other_prepared if arguments.pop("other", False) else prepared, **arguments)
    with pytest.raises(UserError, match=message) as error:
        other.train_dataloader().load_state_dict(state)
    assert "\n" not in str(error.value)


class _FailedError(Exception):
    """What a training dies of."""


class _Recorder(L.LightningModule):
    """Learns nothing, remembers its batches, and fails at a step if told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.seen: list[str] = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise _FailedError
        self.seen.append(batch["record"])
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 90}], ids=["epochs", "steps"])
@pytest.mark.parametrize("every", ["epoch", "step"])
def test_a_training_that_failed_goes_on_where_its_checkpoint_is(prepared, tmp_path, limit, every):
    """litData#775: an exception in the second epoch, and a resume from the checkpoint that ModelCheckpoint had saved.

    Lightning 2.6 restores no loader where an epoch has ended and epochs are counted, so that a loader of its own would
    begin with the first epoch again.
    """
    length = len(module(prepared).train_dataloader())
    fail_at = length + 4

    def fit(model: _Recorder, checkpoint: Path | None = None) -> Path:
        saving = L.pytorch.callbacks.ModelCheckpoint(
            dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1 if every == "step" else None
        )
        trainer = L.Trainer(
            accelerator="cpu", logger=False, callbacks=[saving], enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, **limit,
        )  # fmt: skip
        trainer.fit(model, datamodule=module(prepared), ckpt_path=checkpoint)
        return Path(saving.best_model_path)

    whole = _Recorder()
    fit(whole)
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    failed = _Recorder(fail_at)
    with pytest.raises(_FailedError):
        fit(failed)
    checkpoint = max(tmp_path.glob("*.ckpt"), key=lambda path: torch.load(path)["global_step"])
    done = torch.load(checkpoint)["global_step"]
    assert done == (fail_at if every == "step" else length)
    again = _Recorder()
    fit(again, checkpoint)
    assert failed.seen[:done] + again.seen == whole.seen


@pytest.mark.multi_process
@pytest.mark.parametrize("when", ["before", "while it is waited for"])
def test_a_killed_worker_is_a_named_error_and_not_a_hang(data, when):
    data.num_workers = 2
    before = set(multiprocessing.active_children())
    train = data.train_dataloader()
    iterator = iter(train)
    next(iterator)
    worker, _ = set(multiprocessing.active_children()) - before
    begin = time.monotonic()
    if when == "before":
        os.kill(worker.pid, signal.SIGKILL)
    else:
        os.kill(worker.pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
    with pytest.raises(DataWorkerError, match="a data worker died"):
        list(iterator)
    assert time.monotonic() - begin < 60


def test_a_reader_travels_without_its_open_files(data):
    train = data.train_dataloader()
    next(iter(train))
    reader = train.reader
    assert reader._open
    assert not pickle.loads(pickle.dumps(reader))._open
