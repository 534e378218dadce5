"""Saving: whole or not at all, in what order, and what storage that fails leaves behind."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_lightning.checkpoints.choice import last_checkpoint
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.checkpoints.manifest import Manifest, problem_of
from muse_lightning.files import sha256_file


def content(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"weight": torch.full((300, 100), float(step))}}


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def io(request: pytest.FixtureRequest) -> Any:
    io = DurableCheckpointIO(is_asynchronous=request.param)
    yield io
    io.teardown()


def test_what_is_saved_is_loaded(io: DurableCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "new" / "step=3.ckpt"
    calls: list[bool] = []
    io.save_checkpoint(
        content(3),
        path,
        {"data": {"train": 1}, "metrics": {"val/loss": 2.0}, "then": lambda: calls.append(path.exists())},
    )
    io.wait()
    assert calls == [True]
    assert io.failure is None
    assert Manifest.read(path) == Manifest(3, path.stat().st_size, sha256_file(path), {"train": 1}, {"val/loss": 2.0})
    found = io.load_checkpoint(path)
    assert found["format_version"] == 1
    assert torch.equal(found["state_dict"]["weight"], content(3)["state_dict"]["weight"])


def test_steps_reach_the_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's name on the disk first; content before its name, that before the manifest's content, that before the
    manifest's name."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.split('.partial')[0]}")
        fsync(descriptor)

    def note_replace(source: str, target: Path) -> None:
        events.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    folder = tmp_path / "checkpoints"
    DurableCheckpointIO(False).save_checkpoint(content(1), folder / "step=1.ckpt")
    assert events[0] == f"fsync {tmp_path.name}"
    assert events[-6:] == [
        "fsync .step=1.ckpt",
        "rename step=1.ckpt",
        "fsync checkpoints",
        "fsync .step=1.manifest.json",
        "rename step=1.manifest.json",
        "fsync checkpoints",
    ]


def test_nothing_outside_the_folder_is_written(
    io: DurableCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary file elsewhere, as in TMPDIR, could be on another mount, where a rename is a copy."""
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    io.save_checkpoint(content(1), tmp_path / "checkpoints" / "step=1.ckpt")
    io.wait()
    assert problem_of(tmp_path / "checkpoints" / "step=1.ckpt") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def fails_at(calls: int, code: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A system call that fails from the given call on."""
    count = 0

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise OSError(code, os.strerror(code))
        return function(*args, **options)

    return fail


class FullFile:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


# fsync: file, folder, manifest, folder. replace: file, manifest.
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("name", "calls"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("replace", 0), ("replace", 1)], ids=str
)
def test_storage_that_fails_leaves_the_one_before(
    io: DurableCheckpointIO,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    calls: int,
    code: int,
) -> None:
    io.save_checkpoint(content(1), tmp_path / "step=1.ckpt")
    io.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails_at(calls, code, getattr(os, name)))
        io.save_checkpoint(content(2), tmp_path / "step=2.ckpt")
        io.wait()
    assert io.failure is not None
    assert io.failure.errno == code
    line = capsys.readouterr().err
    assert line.startswith(f"checkpoint: warning: {tmp_path}/step=2.ckpt was not saved: {os.strerror(code)}; earlier")
    assert last_checkpoint(tmp_path, say=lambda text: None) == tmp_path / "step=1.ckpt"
    assert not list(tmp_path.glob(".*"))
    io.save_checkpoint(content(3), tmp_path / "step=3.ckpt")
    io.wait()
    assert io.failure is None
    assert last_checkpoint(tmp_path) == tmp_path / "step=3.ckpt"


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_a_disk_that_gets_full(
    io: DurableCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    io.save_checkpoint(content(1), tmp_path / "step=1.ckpt")
    io.wait()
    real = open
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, mode: FullFile(real(path, mode), room))
        io.save_checkpoint(content(2), tmp_path / "step=2.ckpt")
        io.wait()
    assert io.failure is not None
    assert io.failure.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=1.ckpt", "step=1.manifest.json"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM], ids=errno.errorcode.get)
def test_storage_that_cannot_rename(
    io: DurableCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "replace", fails_at(0, code, os.replace))
    io.save_checkpoint(content(1), tmp_path / "step=1.ckpt")
    io.wait()
    assert io.failure is None
    assert problem_of(tmp_path / "step=1.ckpt") is None
    assert not list(tmp_path.glob(".*"))


def test_an_error_that_is_no_storages_is_raised(io: DurableCheckpointIO, tmp_path: Path) -> None:
    io.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        io.save_checkpoint(content(1), tmp_path / "step=1.ckpt")


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    """What is written is the state at the save; the next save waits for it."""
    io = DurableCheckpointIO()
    may_write, order = threading.Event(), []
    io.submit(lambda: may_write.wait(30) and None)
    state = content(1)
    saving = threading.Thread(
        target=lambda: (io.save_checkpoint(state, tmp_path / "step=1.ckpt"), order.append("saved"))
    )
    saving.start()
    saving.join(0.2)
    assert saving.is_alive()
    order.append("writer is free")
    may_write.set()
    saving.join()
    assert order == ["writer is free", "saved"]
    io.wait()

    may_write.clear()
    hold = tmp_path / "hold"
    write = io._write
    io._write = lambda *args, **options: (may_write.wait(30), write(*args, **options))
    io.save_checkpoint(state, hold / "step=1.ckpt")
    assert io.is_busy
    state["state_dict"]["weight"].zero_()
    may_write.set()
    io.teardown()
    assert torch.equal(io.load_checkpoint(hold / "step=1.ckpt")["state_dict"]["weight"], torch.ones(300, 100))


def test_a_checkpoint_is_removed_after_what_is_newer_is_on_the_disk(
    io: DurableCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    unlink = Path.unlink

    def note(path: Path, missing_ok: bool = False) -> None:
        assert problem_of(tmp_path / "step=2.ckpt") is None
        removed.append(path.name)
        unlink(path, missing_ok)

    io.save_checkpoint(content(1), tmp_path / "step=1.ckpt")
    io.save_checkpoint(content(2), tmp_path / "step=2.ckpt")
    monkeypatch.setattr(Path, "unlink", note)
    io.remove_checkpoint(tmp_path / "step=1.ckpt")
    assert removed == ["step=1.manifest.json", "step=1.ckpt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=2.manifest.json"]


class Marker:
    """What a hostile checkpoint runs."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_only: bool | None) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Marker()}, "hostile.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        DurableCheckpointIO().load_checkpoint("hostile.ckpt", weights_only=weights_only)
    assert not Path("ran").exists()
    torch.load("hostile.ckpt", weights_only=False)
    assert Path("ran").exists()


def test_an_error_of_an_earlier_job_is_not_lost_behind_a_later_one(tmp_path: Path) -> None:
    io = DurableCheckpointIO()
    io.submit(lambda: 1 // 0)
    io.submit(lambda: None)
    with pytest.raises(ZeroDivisionError):
        io.wait()
    io.wait()
    assert not io.is_busy
    io.teardown()
