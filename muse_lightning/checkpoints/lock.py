"""The lock of a run folder: one process at a time trains in it, and a dead one's lock is in nobody's way.

An flock decides between processes of one kernel, which frees it when its holder dies. Between machines that share a
folder it may not reach; there the holder's heartbeat decides, a count in the file that goes up as long as it lives.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from muse_lightning.errors import RetryError, UserError

LOCK_FILE = "lock"
HEARTBEAT_S = 5.0
SETTLE_S = 0.1
"""A file that is being written on another machine may be seen half written, not for longer than this."""
TIMEOUT_S = 30.0
"""Who has not been heard of for so long is dead. A process that is stopped (SIGSTOP) for longer, on another machine,
seems so too."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    boot_id: str
    """Of the kernel: containers of one machine have different hosts and the same kernel."""
    heartbeat: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
        """The one that runs this."""
        boot_id = ""
        with suppress(OSError):
            boot_id = _BOOT_ID.read_text().strip()
        return cls(socket.gethostname(), os.getpid(), boot_id)

    @classmethod
    def read(cls, descriptor: int) -> "Holder | None":
        """Who a lock file names; None if nobody, as after a release."""
        try:
            return cls(**json.loads(os.pread(descriptor, 4096, 0)))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class FolderLock:
    """The lock of a folder, held until `release`; `acquire` makes it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._holder = Holder.this_process()
        self._is_released = threading.Event()
        self._write(0)
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, folder: Path, timeout_s: float | None = None) -> "FolderLock":
        """Take the lock of a folder.

        Args:
            folder: it exists.
            timeout_s: how long to wait for another holder, and the silence after which one on another machine is dead.
                None: TIMEOUT_S, or no time on a terminal, where somebody can look.
        Raises:
            RetryError: another process lives in it.
            UserError: likewise, on a terminal.
            OSError: it cannot be written.
        """
        is_interactive = sys.stderr.isatty() and timeout_s is None
        silence_s = TIMEOUT_S if timeout_s is None else timeout_s
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            holder = _wait_for(descriptor, 0.0 if is_interactive else silence_s)
            if holder is None:
                holder = _wait_for_silence(descriptor, silence_s)
            if holder is not None:
                message = f"{folder} is in use by {holder}"
                raise UserError(f"{message}; wait for it to end") if is_interactive else RetryError(message)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Let others in."""
        if self._is_released.is_set():
            return
        self._is_released.set()
        self._thread.join()
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _beat(self) -> None:
        count = 0
        while not self._is_released.wait(HEARTBEAT_S):
            count += 1
            self._write(count)

    def _write(self, heartbeat: int) -> None:
        text = json.dumps(asdict(self._holder) | {"heartbeat": heartbeat}).encode()
        # A full disk ends no training.
        with suppress(OSError):
            os.ftruncate(self._descriptor, os.pwrite(self._descriptor, text, 0))


def holder_of(folder: Path) -> Holder | None:
    """Who holds the lock of a folder on this machine; None if nobody does."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return Holder.read(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, timeout_s: float) -> Holder | None:
    """Wait until the kernel gives the lock; who holds it if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return Holder.read(descriptor) or Holder("this machine", 0, "")
            time.sleep(min(0.2, timeout_s / 10))
        else:
            return None


def _wait_for_silence(descriptor: int, timeout_s: float) -> Holder | None:
    """With the kernel's lock in hand: who is alive on another machine; None if nobody is."""
    first = _named_in(descriptor)
    if first is None or first.boot_id == Holder.this_process().boot_id:
        return None
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        time.sleep(min(0.2, timeout_s / 10))
        now = _named_in(descriptor)
        if now is None:
            return None
        if now != first:
            return now
    return None


def _named_in(descriptor: int) -> Holder | None:
    """Who a file names; None if nobody, which an empty file says at once and one of other content after SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        holder = Holder.read(descriptor)
        is_settled = time.monotonic() >= deadline
        if holder is not None or is_settled or os.fstat(descriptor).st_size == 0:
            return holder
        time.sleep(SETTLE_S / 20)
