"""The lock of a run folder: against the living, not against the dead, on this machine and on another."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from muse_lightning.checkpoints import lock
from muse_lightning.checkpoints.lock import FolderLock, Holder, holder_of
from muse_lightning.errors import RetryError, UserError


@pytest.fixture(autouse=True)
def _fast_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.02)


def test_one_at_a_time(tmp_path: Path) -> None:
    first = FolderLock.acquire(tmp_path)
    assert holder_of(tmp_path) is not None
    started = time.monotonic()
    with pytest.raises(RetryError) as error:
        FolderLock.acquire(tmp_path, timeout_s=0.3)
    assert str(error.value) == f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}"
    assert time.monotonic() - started >= 0.3
    first.release()
    first.release()
    assert holder_of(tmp_path) is None
    FolderLock.acquire(tmp_path, timeout_s=0.3).release()


def test_one_that_ends_in_time_is_waited_for(tmp_path: Path) -> None:
    first = FolderLock.acquire(tmp_path)
    threading.Timer(0.2, first.release).start()
    FolderLock.acquire(tmp_path, timeout_s=20).release()


def test_on_a_terminal_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FolderLock.acquire(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"is in use by process \d+ on .*; wait for it to end"):
        FolderLock.acquire(tmp_path)
    assert time.monotonic() - started < 5
    first.release()


def test_a_killed_holder_is_in_nobodys_way(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from muse_lightning.checkpoints.lock import FolderLock\n"
        f"held = FolderLock.acquire(Path({str(tmp_path)!r})); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        assert holder_of(tmp_path) == Holder.read(os.open(tmp_path / "lock", os.O_RDONLY))
        other.kill()
        other.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == other.pid
    started = time.monotonic()
    FolderLock.acquire(tmp_path, timeout_s=20).release()
    assert time.monotonic() - started < 5


def elsewhere(folder: Path, heartbeat: int, boot_id: str = "another") -> None:
    """A lock that a process on another machine has written, which its kernel's flock does not reach."""
    holder = json.dumps({"host": "far", "pid": 7, "boot_id": boot_id, "heartbeat": heartbeat}).encode()
    # In place, as a holder does: it is never empty in between.
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(descriptor, os.pwrite(descriptor, holder, 0))
    os.close(descriptor)


def test_a_heart_that_beats_on_another_machine(tmp_path: Path) -> None:
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.02):
            count += 1
            elsewhere(tmp_path, count)

    elsewhere(tmp_path, 0)
    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RetryError, match="is in use by process 7 on far"):
        FolderLock.acquire(tmp_path, timeout_s=2)
    stop.set()
    thread.join()
    started = time.monotonic()
    FolderLock.acquire(tmp_path, timeout_s=0.3).release()
    assert time.monotonic() - started >= 0.3


def test_a_heartbeat_that_is_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system of a network, which shows what is being written piece by piece."""
    monkeypatch.setattr(lock, "SETTLE_S", 5.0)
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.02):
            count += 1
            elsewhere(tmp_path, count)
            whole = (tmp_path / "lock").read_bytes()
            os.truncate(tmp_path / "lock", len(whole) // 2)
            stop.wait(0.02)
            elsewhere(tmp_path, count + 1)

    elsewhere(tmp_path, 0)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        for _ in range(10):
            with pytest.raises(RetryError, match="is in use by process 7 on far"):
                FolderLock.acquire(tmp_path, timeout_s=2)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_lock_that_names_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    started = time.monotonic()
    FolderLock.acquire(tmp_path, timeout_s=20).release()
    assert time.monotonic() - started < 5


def test_a_container_of_this_machine_that_died(tmp_path: Path) -> None:
    """Another host name, the same kernel: its flock has spoken."""
    elsewhere(tmp_path, 3, Holder.this_process().boot_id)
    started = time.monotonic()
    FolderLock.acquire(tmp_path, timeout_s=20).release()
    assert time.monotonic() - started < 5


def test_the_heart_beats_until_the_release(tmp_path: Path) -> None:
    held = FolderLock.acquire(tmp_path)
    deadline = time.monotonic() + 20
    while json.loads((tmp_path / "lock").read_text() or "{}").get("heartbeat", 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release()
    assert (tmp_path / "lock").read_text() == ""


def test_a_full_disk_stops_no_heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    held = FolderLock.acquire(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        time.sleep(0.1)
        assert held._thread.is_alive()
    held.release()
