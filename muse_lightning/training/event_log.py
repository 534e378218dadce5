"""The log of a run for TensorBoard, which a disk that is full costs lines and not the run.

TensorBoard's own writer raises what its thread died of at every later line: the training would end for its log.
"""

import io
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning.fabric.loggers import TensorBoardLogger as Events
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from muse_lightning.checkpoints.choice import report
from muse_lightning.errors import is_storage_error, reason_of

MOST_WAITING_BYTES = 16 << 20
"""What is kept in memory while the storage takes nothing, about 100,000 scalars; what comes after that is lost."""
_VERSION = "brain.Event:2"


class EventLog(TensorBoardLogger):
    """TensorBoardLogger whose lines wait in memory while storage is full, read-only or broken.

    Each time that storage begins to fail, one line of standard error says so, with the folder. What waits is written
    when storage takes it again.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """TensorBoard's writer, made when it is first asked for."""
        if self._experiment is None:
            self._experiment = _Writer(log_dir=self.log_dir, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        """Write what waits; no `hparams.yaml`, for `config.yaml` has the configuration."""
        Events.save(self)


class EventFile:
    """An event file of TensorBoard, written at once by who calls; the interface of tensorboard's EventFileWriter.

    Args:
        folder: made if it is missing.
        flush_every_s: seconds after which an event also writes what waits.
        suffix: of the file's name.
        say: told in one line, for each time that storage begins to fail, what it does not take.
    """

    def __init__(
        self, folder: Path, flush_every_s: float = 120.0, suffix: str = "", say: Callable[[str], None] = report
    ) -> None:
        self._folder = folder
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # As TensorBoard names them: it reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}{suffix}"
        self._path = folder / name
        self._flush_every_s = flush_every_s
        self._say = say
        self._file: io.FileIO | None = None
        self._written_bytes = 0
        self._waiting = io.BytesIO()
        self._records = RecordWriter(self._waiting)
        self._next_flush = 0.0
        self._is_failing = False
        self._lock = threading.Lock()
        self.add_event(Event(wall_time=time.time(), file_version=_VERSION))

    def get_logdir(self) -> str:
        """The folder."""
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        """Add an event; it waits in memory until a flush."""
        with self._lock:
            if self._waiting.tell() < MOST_WAITING_BYTES:
                self._records.write(event.SerializeToString())
            is_due = time.monotonic() >= self._next_flush
        if is_due:
            self.flush()

    def flush(self) -> None:
        """Write what waits, if storage takes it.

        Raises:
            OSError: of another kind than that storage is full, read-only or broken.
        """
        with self._lock:
            self._next_flush = time.monotonic() + self._flush_every_s
            try:
                self._write()
            except OSError as error:
                if not is_storage_error(error):
                    raise
                if not self._is_failing:
                    self._say(
                        f"log: warning: {self._folder} takes no more lines for TensorBoard: {reason_of(error)}; the "
                        "training goes on, they are written when it takes them again"
                    )
                self._is_failing = True
            else:
                self._is_failing = False

    def _write(self) -> None:
        """What a write that failed has left is written over: readers wait for the rest of a record that is cut."""
        data = memoryview(self._waiting.getvalue())
        if not data:
            return
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self._path, "w")
        self._file.seek(self._written_bytes)
        while data:
            data = data[self._file.write(data) :]
        self._written_bytes = self._file.tell()
        self._waiting.seek(0)
        self._waiting.truncate()

    def close(self) -> None:
        """Write what waits, and close the file."""
        self.flush()
        with self._lock, suppress(OSError):
            if self._file is not None:
                self._file.close()


class _FileWriter(FileWriter):
    def __init__(self, log_dir: str, flush_secs: float, filename_suffix: str) -> None:
        self.event_writer = EventFile(Path(log_dir), flush_secs, filename_suffix)


class _Writer(SummaryWriter):
    def _get_file_writer(self) -> FileWriter:
        writer: FileWriter | None = vars(self)["file_writer"]
        if writer is None:
            writer = _FileWriter(self.log_dir, self.flush_secs, self.filename_suffix)
            vars(self).update(file_writer=writer, all_writers={writer.get_logdir(): writer})
            if self.purge_step is not None:
                step, self.purge_step = self.purge_step, None
                # Readers purge by the version of a file, or by the beginning of a session.
                writer.add_event(Event(step=step, file_version=_VERSION))
                writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        return writer
