"""Our own code, broken on purpose: the sweep must find each. A mutant changes the process that it is called in."""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from muse_lightning.checkpoints import choice, durable_checkpoint, durable_io, manifest, retention
from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.checkpoints.manifest import Manifest, manifest_path
from muse_lightning.checkpoints.retention import Retention
from muse_lightning.files import PARTIAL, fsync_path, sha256_bytes
from tests.faults.sweep.runs import Scene
from tests.faults.sweep.sweeping import Outcome, sweep
from tests.faults.sweep.training import STEPS


def _replace_atomic_file(function: Callable[..., Iterator[BinaryIO]]) -> None:
    for module in (durable_io, manifest):
        module.atomic_file = contextmanager(function)


def _no_fsync_where(is_skipped: Callable[[int], bool]) -> None:
    fsync = os.fsync
    os.fsync = lambda file: None if is_skipped(os.fstat(file).st_mode) else fsync(file)


def no_fsync_of_files() -> None:
    """Content may be lost after its name."""
    _no_fsync_where(stat.S_ISREG)


def no_fsync_of_folders() -> None:
    """Names may be lost."""
    _no_fsync_where(stat.S_ISDIR)


def fsync_after_rename() -> None:
    """A name before its content."""

    def atomic_file(path: Path, *, may_copy: bool = False) -> Iterator[BinaryIO]:
        temporary = path.with_name(f".{path.name}{PARTIAL}0")
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
        fsync_path(path)
        fsync_path(path.parent)

    _replace_atomic_file(atomic_file)


def written_in_place() -> None:
    """Under its final name from the first byte."""

    def atomic_file(path: Path, *, may_copy: bool = False) -> Iterator[BinaryIO]:
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fsync_path(path.parent)

    _replace_atomic_file(atomic_file)


def temporary_file_elsewhere() -> None:
    """Written in TMPDIR and moved, which on another mount is a copy: what Lightning does."""

    def atomic_file(path: Path, *, may_copy: bool = False) -> Iterator[BinaryIO]:
        descriptor, temporary = tempfile.mkstemp()
        with open(descriptor, "wb") as file:
            yield file
        shutil.move(temporary, path)
        fsync_path(path)
        fsync_path(path.parent)

    _replace_atomic_file(atomic_file)


def manifest_first() -> None:
    """The manifest before what it speaks of."""

    def write(self: Any, checkpoint: Any, path: Path, metrics: Any = None, data: Any = None, then: Any = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable_io.fsync_names_of(path.parent)
        content = BytesIO()
        torch.save(checkpoint, content)
        size, sha256 = len(content.getvalue()), sha256_bytes(content.getvalue())
        Manifest(checkpoint["global_step"], size, sha256, data, metrics or {}).write(path)
        with durable_io.atomic_file(path) as file:
            file.write(content.getvalue())
        if then is not None:
            then()

    DurableCheckpointIO._write = write


def write_errors_swallowed() -> None:
    """A part that could not be written is left out, and hashed all the same."""

    def write(self: Any, data: Any) -> int:
        with suppress(OSError):
            self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)

    durable_io._HashedFile.write = write


def fsync_errors_swallowed() -> None:
    """What the disk did not take counts as saved."""
    fsync = os.fsync

    def quiet(file: Any) -> None:
        with suppress(OSError):
            fsync(file)

    os.fsync = quiet


def failure_not_said() -> None:
    """A save that fails is passed over in silence, as Lightning does with a PermissionError."""
    DurableCheckpointIO._save = lambda self, checkpoint, path, **options: _quietly(
        lambda: self._write(checkpoint, path, **options)
    )


def _quietly(act: Callable[[], None]) -> None:
    with suppress(OSError):
        act()


def room_made_before_the_save() -> None:
    """The oldest is removed before the new one is on the disk: Lightning issue 14035."""
    write = DurableCheckpointIO._write

    def remove_and_write(self: Any, checkpoint: Any, path: Path, **options: Any) -> None:
        whole = [step for step, _ in choice.stored(path.parent) if step < checkpoint["global_step"]]
        for step in whole[1:]:
            retention.remove_checkpoint(choice.step_path(path.parent, step))
        write(self, checkpoint, path, **options)

    DurableCheckpointIO._write = remove_and_write


def one_kept() -> None:
    """Only the newest stays."""
    make = Retention.__init__
    Retention.__init__ = lambda self, keep_last, keep_best, resumed=None: make(self, 1, keep_best, resumed)


def best_not_kept() -> None:
    """The one with the lowest loss goes like any other."""
    make = Retention.__init__
    Retention.__init__ = lambda self, keep_last, keep_best, resumed=None: make(self, keep_last, False, resumed)


def data_removed_first() -> None:
    """A checkpoint is removed before its manifest."""

    def remove(path: Path) -> None:
        path.unlink(missing_ok=True)
        manifest_path(path).unlink(missing_ok=True)

    retention.remove_checkpoint = remove


def unreadable_means_damaged() -> None:
    """A manifest that cannot be read for once is taken for none."""
    whole = Retention._whole

    def whole_or_none(self: Any, step: int, path: Path) -> Manifest | None:
        try:
            return whole(self, step, path)
        except OSError:
            return None

    Retention._whole = whole_or_none


def saves_not_awaited() -> None:
    """The training ends while its last save is being written."""
    write = DurableCheckpointIO._write

    def write_slowly(self: Any, checkpoint: Any, path: Path, **options: Any) -> None:
        if checkpoint["global_step"] == STEPS:
            time.sleep(1.0)
        write(self, checkpoint, path, **options)

    DurableCheckpointIO._write = write_slowly
    DurableCheckpoint._finish = lambda self, trainer: None
    DurableCheckpointIO.teardown = lambda self: None


def leftovers_stay() -> None:
    """What killed saves have left is not removed."""
    durable_checkpoint.remove_partial = lambda folder: None


def manifest_not_required() -> None:
    """The newest file is the last checkpoint, whole or not."""

    def newest(folder: Path, say: Any = None) -> Path | None:
        return next((path for _, path in choice.stored(folder) if path.exists()), None)

    choice.last_checkpoint = newest


def hash_not_checked() -> None:
    """A checkpoint of the right size is taken for whole."""

    def problem_of(checkpoint: Path) -> str | None:
        try:
            is_whole = Manifest.read(checkpoint).size_bytes == checkpoint.stat().st_size
        except (OSError, ValueError) as error:
            return str(error)
        return None if is_whole else "its size"

    choice.problem_of = problem_of


def folder_name_not_flushed() -> None:
    """The folder of the checkpoints may be lost with all that is in it."""
    durable_io.fsync_names_of = lambda folder: None


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        no_fsync_of_files,
        no_fsync_of_folders,
        folder_name_not_flushed,
        fsync_after_rename,
        written_in_place,
        temporary_file_elsewhere,
        manifest_first,
        manifest_not_required,
        hash_not_checked,
        write_errors_swallowed,
        fsync_errors_swallowed,
        failure_not_said,
        room_made_before_the_save,
        one_kept,
        best_not_kept,
        data_removed_first,
        unreadable_means_damaged,
        saves_not_awaited,
        leftovers_stay,
    )
}


def verdict(name: str) -> Outcome | None:
    """The first run, of those about the second of the saves, that finds a mutant; None if none does."""
    for outcome in sweep(
        Scene(Path("/dev/shm"), is_asynchronous=True, mutant=MUTANTS[name]),
        with_reads=name == unreadable_means_damaged.__name__,
        files=r"step=2|checkpoints$|run$",
    ):
        if outcome.problems:
            return outcome
    return None
