"""A run's log: what TensorBoard reads of it, and storage that takes no more."""

import errno
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from muse_lightning.training import event_log
from muse_lightning.training.event_log import EventFile, EventLog

WARNING = "log: warning: {} takes no more lines for TensorBoard: {}; the training goes on, "


def log_at(root: Path, **options: Any) -> EventLog:
    return EventLog(save_dir=root, name="run", version="version_0", **options)


def steps(root: Path, tag: str = "loss") -> list[tuple[int, float]]:
    """As TensorBoard reads them."""
    events = EventAccumulator(str(root / "run/version_0")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.scalars.Keys() else []


class Disk:
    """Lets each write of a file take so many bytes, then fail."""

    room: int | None = None
    error = errno.ENOSPC


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            if found.room is None:
                return super().write(data)
            if found.room == 0:
                raise OSError(found.error, "the disk says no")
            taken = super().write(bytes(data)[: found.room])
            found.room -= taken
            return taken

    monkeypatch.setattr(event_log.io, "FileIO", File)
    return found


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    for step in range(5):
        log.log_metrics({"loss": step / 2}, step)
    log.experiment.add_figure("curve", Figure(), 3)
    log.experiment.add_histogram("weights", torch.arange(9.0), 3)
    log.finalize("success")
    assert steps(tmp_path) == [(step, step / 2) for step in range(5)]
    tags = EventAccumulator(str(log.log_dir)).Reload().Tags()
    assert (tags["images"], tags["histograms"]) == (["curve"], ["weights"])


def test_a_line_is_there_when_it_is_saved(tmp_path: Path) -> None:
    log = log_at(tmp_path)
    log.log_metrics({"loss": 1.0}, 1)
    log.save()
    assert steps(tmp_path) == [(1, 1.0)]
    log.finalize("success")


def test_what_follows_the_checkpoint_is_purged(tmp_path: Path) -> None:
    for first, purge_step in ((0, None), (3, 3)):
        log = log_at(tmp_path, purge_step=purge_step)
        for step in range(first, first + 6):
            log.log_metrics({"loss": float(first)}, step)
        log.finalize("success")
    assert steps(tmp_path) == [(0, 0.0), (1, 0.0), (2, 0.0), *((step, 3.0) for step in range(3, 9))]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("room", [0, 1, 30])
def test_lines_wait_for_a_disk_that_is_full(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str], code: int, room: int
) -> None:
    disk.error = code
    log = log_at(tmp_path)
    for step in range(30):
        # Full twice, and a reader in between that finds a record cut.
        disk.room = room if step in (5, 15) else None if step in (10, 20) else disk.room
        log.log_metrics({"loss": float(step)}, step)
        log.save()
        if step == 8:
            assert steps(tmp_path) == [(earlier, float(earlier)) for earlier in range(5)]
    log.finalize("success")
    assert steps(tmp_path) == [(step, float(step)) for step in range(30)]
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(WARNING.format(log.log_dir, "the disk says no")) for line in lines] == [True] * 2


def test_a_disk_that_stays_full_ends_nothing(tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.room = 0
    log = log_at(tmp_path)
    for step in range(3):
        log.log_metrics({"loss": 1.0}, step)
        log.save()
    log.finalize("success")
    assert steps(tmp_path) == []
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    said: list[str] = []
    monkeypatch.setattr(Path, "mkdir", refuse)
    file = EventFile(tmp_path / "there", say=said.append)
    monkeypatch.undo()
    file.close()
    assert [str(tmp_path / "there") in line for line in said] == [True]
    assert len(list((tmp_path / "there").iterdir())) == 1


def test_another_error_is_raised(tmp_path: Path, disk: Disk) -> None:
    log = log_at(tmp_path)
    log.log_metrics({"loss": 1.0}, 1)
    disk.room, disk.error = 0, errno.EBADF
    with pytest.raises(OSError, match="the disk says no"):
        log.save()
    disk.room = None
    log.finalize("success")


def test_memory_is_bounded(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MOST_WAITING_BYTES", 4000)
    disk.room = 0
    file = EventFile(tmp_path / "run/version_0", say=lambda line: None)
    for step in range(500):
        file.add_event(Event(step=step, summary=Summary(value=[Summary.Value(tag="loss", simple_value=step)])))
        file.flush()
    disk.room = None
    file.close()
    kept = steps(tmp_path)
    assert kept == [(step, float(step)) for step in range(len(kept))]
    assert 10 < len(kept) < 200


@pytest.mark.parametrize(("kind", "others"), [(EventLog, []), (TensorBoardLogger, ["hparams.yaml"])])
def test_nothing_beside_events(tmp_path: Path, kind: type[TensorBoardLogger], others: list[str]) -> None:
    logger = kind(tmp_path, name="run", version="version_0")
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.save()
    names = sorted(path.name for path in Path(logger.log_dir).iterdir())
    assert [name for name in names if not name.startswith("events.out.tfevents.")] == others
    assert len(names) == len(others) + 1
