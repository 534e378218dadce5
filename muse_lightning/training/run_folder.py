"""The folder of one run, `ROOT/NAME/version_N`: created exclusively, or gone on in, and locked while the run lives."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from muse_lightning.checkpoints.choice import (
    MONITOR,
    best_checkpoint,
    by_metric,
    has_manifest,
    last_checkpoint,
    stored,
)
from muse_lightning.checkpoints.lock import FolderLock, holder_of
from muse_lightning.errors import StorageError, UserError, is_storage_error, reason_of
from muse_lightning.files import atomic_write

RUN_FOLDER_VARIABLE = "MUSE_RUN_FOLDER"
"""Environment variable that tells the ranks that the first of a node starts which folder the run has."""
CHECKPOINT_VARIABLE = "MUSE_CHECKPOINT"
"""Likewise the checkpoint that the run goes on from."""
NODE_VARIABLE = "NODE_RANK"
"""Which node this is; whoever starts one command per node sets it (Lightning's LightningEnvironment)."""
CHECKPOINTS = "checkpoints"


class RunFolder:
    """A run's folder. Use as a context manager: leaving it releases the lock.

    `is_owner` is true on rank 0, the one process that writes here; other ranks only know the path. `resumed` is the
    checkpoint that an earlier run has left here and this one goes on from.
    """

    def __init__(
        self, path: Path, lock: FolderLock | None = None, made: Sequence[Path] = (), resumed: Path | None = None
    ) -> None:
        self.path = path
        self.resumed = resumed
        self._lock = lock
        self._made = made
        self._is_told = False
        self.is_inherited = lock is None and RUN_FOLDER_VARIABLE in os.environ
        """Whether another process, the first of this node, has started this one."""
        self._found = set(path.rglob("*")) if lock is not None and resumed is not None else set()

    @classmethod
    def create(cls, root: Path, name: str, version: int | None = None) -> "RunFolder":
        """Create the folder on rank 0; on other ranks, learn which it is.

        Two runs that start at the same time get different versions: `mkdir` succeeds for one of them only.

        Args:
            root, name: the folder is `root/name/version_N`.
            version: N. None: the first number above all that exist.
        Raises:
            UserError: this version exists already (and whether a run is using it), or no folder can be there.
            StorageError: the folder cannot be created: full, read-only, no permission.
        """
        if not _is_rank_zero():
            # A launcher that starts all ranks at once (torchrun, SLURM) leaves them without the variable: Lightning
            # then sends rank 0's paths to them, and nothing is ever written to this one.
            return cls(Path(os.environ.get(RUN_FOLDER_VARIABLE, root / name / "unknown")))._tell()
        parent = root / name
        made: list[Path] = []
        try:
            made = [folder for folder in (parent, root) if not folder.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            path = _make_version(parent, version)
            lock = FolderLock.acquire(path)
        except OSError as error:
            _remove_empty(made)
            raise _refusal(f"run.root: cannot create a folder in {parent}", error) from None
        return cls(path, lock, made)._tell()

    @classmethod
    def resume(cls, root: Path, name: str, version: int | None = None) -> "RunFolder | None":
        """Go on in the newest version that has a checkpoint which is whole; None where there is none.

        Args:
            root, name: folders are `root/name/version_N`.
            version: N, to look at that one alone.
        Raises:
            RetryError: another process uses it.
            UserError: likewise, on a terminal.
            StorageError: it cannot be written.
        """
        if not _is_rank_zero():
            return cls._resumed_by_rank_zero(root, name, version)
        for path in versions_with_checkpoints(root, name, version):
            try:
                lock = FolderLock.acquire(path)
            except OSError as error:
                raise _refusal(f"run.root: cannot write in {path}", error) from None
            checkpoint = last_checkpoint(path / CHECKPOINTS)
            if checkpoint is not None:
                return cls(path, lock, resumed=checkpoint)._tell()
            lock.release()
        return None

    @classmethod
    def _resumed_by_rank_zero(cls, root: Path, name: str, version: int | None) -> "RunFolder | None":
        if CHECKPOINT_VARIABLE in os.environ:
            checkpoint = Path(os.environ[CHECKPOINT_VARIABLE])
            return cls(checkpoint.parent.parent, resumed=checkpoint)
        if RUN_FOLDER_VARIABLE in os.environ:
            return None
        # Started beside rank 0: the same files have the same answer.
        for path in versions_with_checkpoints(root, name, version):
            found = last_checkpoint(path / CHECKPOINTS, say=lambda line: None)
            if found is not None:
                return cls(path, resumed=found)._tell()
        return None

    def _tell(self) -> "RunFolder":
        """Let the ranks know that this process starts, if it is the first of a node and no launcher starts them."""
        self._is_told = not self.is_inherited
        if self._is_told:
            os.environ[RUN_FOLDER_VARIABLE] = str(self.path.resolve())
            if self.resumed is not None:
                os.environ[CHECKPOINT_VARIABLE] = str(self.resumed.resolve())
        return self

    @property
    def is_owner(self) -> bool:
        """Whether this process created the folder and may write to it."""
        return self._lock is not None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / CHECKPOINTS

    def write(self, name: str, text: str) -> None:
        """Write a small file whole or not at all; does nothing on other ranks."""
        if self.is_owner:
            # A part is of a start that a kill has ended before its first step.
            atomic_write(self.path / name, text, may_copy=True)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write `environment.json`: what the run runs on; of one that goes on, `environment.step=N.json`."""
        self.write(self.record("environment", "json"), json.dumps(environment, indent=2) + "\n")

    def record(self, stem: str, suffix: str) -> str:
        """Name of a file that each start of a run writes: that of the first, or with the step that it goes on from."""
        return f"{stem}.{suffix}" if self.resumed is None else f"{stem}.{self.resumed.stem}.{suffix}"

    def discard(self) -> None:
        """Remove the folder: for a run that ended before it trained, so that nothing half-made is left. Of one that
        was to go on, only what is new in it."""
        if not self.is_owner:
            return
        if self.resumed is not None:
            for path in sorted(set(self.path.rglob("*")) - self._found, reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            return
        shutil.rmtree(self.path)
        _remove_empty(self._made)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
        if self._is_told:
            os.environ.pop(RUN_FOLDER_VARIABLE, None)
            os.environ.pop(CHECKPOINT_VARIABLE, None)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def find_checkpoint(root: Path, name: str, which: str, version: int | None = None) -> Path:
    """The last or the best checkpoint of the newest version that has one.

    Args:
        root, name: folders are `root/name/version_N`.
        which: "last" or "best".
    Raises:
        UserError: there is none, or none of which a validation is noted.
    """
    find = {"last": last_checkpoint, "best": best_checkpoint}[which]
    if not _is_rank_zero() and CHECKPOINT_VARIABLE in os.environ:
        return Path(os.environ[CHECKPOINT_VARIABLE])
    folders = [path / CHECKPOINTS for path in versions_with_checkpoints(root, name, version)]
    for folder in folders:
        found = find(folder)
        if found is not None:
            if _is_rank_zero():
                os.environ[CHECKPOINT_VARIABLE] = str(found.resolve())
            return found
    saved = [path for folder in folders for _, path in stored(folder) if path.exists()]
    if which == "best" and saved and not any(by_metric(folder) for folder in folders):
        raise UserError(
            f"ckpt_path: best found, the lowest {MONITOR}, but no checkpoint in {root / name} has one noted, as only "
            f"DurableCheckpoint does, after a validation; accepted: last, or a path, such as {saved[0]}"
        )
    wanted = "" if which == "last" else ", measured by a validation"
    raise UserError(f"ckpt_path: {which} found, but no run in {root / name} has a checkpoint that is whole{wanted}")


def versions_with_checkpoints(root: Path, name: str, version: int | None = None) -> Iterator[Path]:
    """Run folders of a name that have a checkpoint with a manifest, the newest version first.

    Those of `muse reproduce`, which end where they were told to, only if `version` names them.
    """
    for number in sorted(_versions(root / name), reverse=True):
        path = root / name / f"version_{number}"
        is_chosen = number == version or (version is None and not _is_reproduction(path))
        if is_chosen and has_manifest(path / CHECKPOINTS):
            yield path


def _is_reproduction(path: Path) -> bool:
    try:
        environment = json.loads((path / "environment.json").read_text())
    except (OSError, ValueError):
        return False  # of an older version, or damaged: nothing that training depends on
    return isinstance(environment, dict) and environment.get("reproduces") is not None


def _refusal(what: str, error: OSError) -> UserError | StorageError:
    has_fault = is_storage_error(error) or isinstance(error, PermissionError)
    return (StorageError if has_fault else UserError)(f"{what}: {reason_of(error)}")


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _is_rank_zero() -> bool:
    # Before there is a trainer, Lightning takes the first process of every node for the first of all.
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get(NODE_VARIABLE, "0") == "0"


def _versions(parent: Path) -> list[int]:
    return [int(path.name[8:]) for path in parent.glob("version_*") if path.name[8:].isdigit()]


def _make_version(parent: Path, version: int | None) -> Path:
    if version is not None:
        path = parent / f"version_{version}"
        try:
            path.mkdir()
        except FileExistsError:
            holder = holder_of(path)
            state = "exists already" if holder is None else f"is in use by {holder}"
            raise UserError(f"run.version: {path} {state}; leave run.version out for a new one") from None
        return path
    number = max(_versions(parent), default=-1) + 1
    while True:
        path = parent / f"version_{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
