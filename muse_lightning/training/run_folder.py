"""The folder of one run, `ROOT/NAME/version_N`: created exclusively, locked while the run lives."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_only

from muse_lightning.errors import UserError
from muse_lightning.files import atomic_write

RUN_FOLDER_VARIABLE = "MUSE_RUN_FOLDER"
"""Environment variable that tells the other ranks of a node, which rank 0 starts, the folder that rank 0 created."""


class RunFolder:
    """A run's folder. Use as a context manager: leaving it releases the lock.

    `is_owner` is true on rank 0, the one process that writes here; other ranks only know the path.
    """

    def __init__(self, path: Path, lock: IO[str] | None = None, made: Sequence[Path] = ()) -> None:
        self.path = path
        self._lock = lock
        self._made = made

    @classmethod
    def create(cls, root: Path, name: str, version: int | None = None) -> "RunFolder":
        """Create the folder on rank 0; on other ranks, learn which it is.

        Two runs that start at the same time get different versions: `mkdir` succeeds for one of them only.

        Args:
            root, name: the folder is `root/name/version_N`.
            version: N. None: the first number above all that exist.
        Raises:
            UserError: this version exists already (and whether a run is using it), or the folder cannot be created.
        """
        if getattr(rank_zero_only, "rank", 0) != 0:
            # A launcher that starts all ranks at once (torchrun, SLURM) leaves them without the variable: Lightning
            # then sends rank 0's paths to them, and nothing is ever written to this one.
            return cls(Path(os.environ.get(RUN_FOLDER_VARIABLE, root / name / "unknown")))
        parent = root / name
        try:
            made = [folder for folder in (parent, root) if not folder.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            path = _make_version(parent, version)
            lock = _acquire(path)
        except OSError as error:
            raise UserError(f"run.root: cannot create a folder in {parent}: {error.strerror}") from None
        os.environ[RUN_FOLDER_VARIABLE] = str(path.resolve())
        return cls(path, lock, made)

    @property
    def is_owner(self) -> bool:
        """Whether this process created the folder and may write to it."""
        return self._lock is not None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    def write(self, name: str, text: str) -> None:
        """Write a small file whole or not at all; does nothing on other ranks."""
        if self.is_owner:
            atomic_write(self.path / name, text)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write `environment.json`: what the run ran on."""
        self.write("environment.json", json.dumps(environment, indent=2) + "\n")

    def discard(self) -> None:
        """Remove the folder: for a run that ended before it trained, so that nothing half-made is left."""
        if self.is_owner:
            shutil.rmtree(self.path)
            for folder in self._made:
                if not any(folder.iterdir()):
                    folder.rmdir()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()
            os.environ.pop(RUN_FOLDER_VARIABLE, None)


def _make_version(parent: Path, version: int | None) -> Path:
    if version is not None:
        path = parent / f"version_{version}"
        try:
            path.mkdir()
        except FileExistsError:
            raise UserError(f"run.version: {path} {_state(path)}; leave run.version out for a new one") from None
        return path
    numbers = [int(p.name.removeprefix("version_")) for p in parent.glob("version_*") if p.name[8:].isdigit()]
    number = max(numbers, default=-1) + 1
    while True:
        path = parent / f"version_{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _lock_file(path: Path) -> Path:
    return path / "lock"


def _acquire(path: Path) -> IO[str]:
    lock = _lock_file(path).open("w", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    json.dump({"host": socket.gethostname(), "pid": os.getpid()}, lock)
    lock.flush()
    return lock


def _state(path: Path) -> str:
    """Whether the run of an existing folder is still going, in words."""
    try:
        with _lock_file(path).open(encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = json.loads(lock.read())
                return f"is in use by process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError):
        pass
    return "exists already"
