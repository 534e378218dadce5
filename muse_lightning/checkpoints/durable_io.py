"""Checkpoints to and from the disk: written whole or not at all, hashed as they are written, in the background."""

import hashlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from muse_lightning.checkpoints.host_copy import HostCopy
from muse_lightning.checkpoints.manifest import FORMAT_VERSION, Manifest, manifest_path
from muse_lightning.errors import reason_of
from muse_lightning.files import atomic_file, fsync_names_of, fsync_path

_SLACK = 1 << 20
"""Bytes for what a checkpoint has besides weights and optimizer: random states of all ranks, counters."""


class DurableCheckpointIO(CheckpointIO):
    """Saves `NAME.ckpt`, then `NAME.manifest.json` (manifest.py), each in a temporary file of the target's folder that
    is flushed to the disk and renamed: whatever kills the process or the machine, what has a manifest is whole.

    Storage that is full or broken does not end the training: a line says so, and earlier checkpoints stay.

    Args:
        is_asynchronous: copy the state to host memory and let a thread write it while training goes on. The next save
            waits for the one before. Takes as much host memory as a checkpoint has.

    Attributes:
        failure: why the last save came to nothing; None if it is on the disk, or on its way.
        blocked_s: seconds that the last save kept the training from going on.
        options_of_next: the `storage_options` of a next save that is given none.
    """

    def __init__(self, is_asynchronous: bool = True) -> None:
        self.is_asynchronous = is_asynchronous
        self.failure: OSError | None = None
        self.blocked_s = 0.0
        self.options_of_next: dict[str, Any] = {}
        self._flushed_folder: Path | None = None
        self._host_copy = HostCopy()
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save it; returns when the training may go on. After `wait`, `failure` says whether it was saved.

        Args:
            checkpoint: nested dictionaries of tensors and plain values, with "global_step".
            path: the file; its folder is made.
            storage_options: with "metrics" and "data", both for the manifest; with "then", what is called, in the
                thread, once the checkpoint is on the disk.
        """
        options, self.options_of_next = storage_options or self.options_of_next, {}
        started = time.perf_counter()
        self.wait()
        checkpoint = {**checkpoint, "format_version": FORMAT_VERSION}
        if self.is_asynchronous:
            checkpoint = self._host_copy.take(checkpoint)
        self.submit(lambda: self._save(checkpoint, Path(path), **options))
        if not self.is_asynchronous:
            self.wait()
        self.blocked_s = time.perf_counter() - started

    def prepare(self, state: Any) -> None:
        """Get the memory for the copies, in the background, so that the first save finds it.

        Args:
            state: nested dictionaries and lists with the tensors that will be saved, or nearly all.
        """
        if self.is_asynchronous:
            size, is_pinned = self._host_copy.needed(state)
            self.submit(lambda: self._host_copy.reserve(size + _SLACK, is_pinned))

    def submit(self, job: Callable[[], None]) -> None:
        """Run something after everything that is being written, in the same thread."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        # One that has failed stays until somebody waits, and hears of it.
        self._jobs = [before for before in self._jobs if not before.done() or before.exception() is not None]
        self._jobs.append(self._thread.submit(job))

    @property
    def is_busy(self) -> bool:
        """Whether something is being written."""
        return any(not job.done() for job in self._jobs)

    def wait(self) -> None:
        """Wait until everything that was submitted is done.

        Raises:
            Exception: the first error that is none of the storage.
        """
        jobs, self._jobs = self._jobs, []
        wait(jobs)
        for job in jobs:
            job.result()

    def _save(self, checkpoint: dict[str, Any], path: Path, **options: Any) -> None:
        try:
            self._write(checkpoint, path, **options)
            self.failure = None
        except OSError as error:
            self.failure = error
            print(
                f"checkpoint: warning: {path} was not saved: {reason_of(error)}; earlier checkpoints stay, the next "
                "save tries again",
                file=sys.stderr,
                flush=True,
            )

    def _write(
        self,
        checkpoint: dict[str, Any],
        path: Path,
        metrics: dict[str, float] | None = None,
        data: dict[str, Any] | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._flushed_folder != path.parent:
            fsync_names_of(path.parent)
            self._flushed_folder = path.parent
        with atomic_file(path, may_copy=True) as file:
            hashed = _HashedFile(file)
            try:
                torch.save(checkpoint, cast(IO[bytes], hashed))
            except RuntimeError:
                # How torch reports that a write failed.
                if hashed.error is None:
                    raise
            if hashed.error is not None:
                raise hashed.error
        manifest = Manifest(checkpoint["global_step"], hashed.size, hashed.sha256.hexdigest(), data, metrics or {})
        manifest.write(path)
        if then is not None:
            then()

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load it to the host. Nothing but tensors and plain values is ever unpickled, whatever `weights_only` is.

        What it is checked against is `choice.py`'s business, before a run is made for it.
        """
        found: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return found

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint once everything newer is on the disk: first its manifest, so that no part is left that
        seems whole."""
        self.wait()
        remove_checkpoint(Path(path))

    def teardown(self) -> None:
        """Finish what is being written."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._host_copy.free()


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and, before it, its manifest."""
    manifest_path(path).unlink(missing_ok=True)
    fsync_path(path.parent)
    path.unlink(missing_ok=True)


class _HashedFile:
    """A file that hashes and counts what is written, and remembers why it was not."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()
