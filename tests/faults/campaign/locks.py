"""Faults of the lock: left by a dead process, or held on another machine that shares the folder."""

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.campaign.files import newest_whole
from tests.faults.campaign.setting import run_of

if TYPE_CHECKING:
    from tests.faults.campaign.faults import Fault

TIMEOUT_S = 0.4
"""In place of the 30 seconds of a real run."""
_PID_FILE = "elsewhere.pid"


def _holder(heartbeat: int, boot_id: str = "another machine") -> str:
    return json.dumps({"host": "elsewhere", "pid": 1, "boot_id": boot_id, "heartbeat": heartbeat})


def stale(folder: Path, fault: "Fault") -> bool:
    """A lock that names a dead process: of another machine, of this one, or a torn file."""
    if not run_of(folder).is_dir():
        return False
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    texts = (_holder(7), _holder(7, boot_id), _holder(7)[:-9])
    (run_of(folder) / "lock").write_text(texts[int(fault.amount * len(texts))])
    return True


def elsewhere(folder: Path, fault: "Fault") -> bool:
    """A process whose heartbeat is in the file, and whose flock does not reach this machine; whether there is a
    checkpoint, as else a new run begins in another folder."""
    if not newest_whole(folder):
        return False
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(run_of(folder) / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        for heartbeat in range(10_000):
            text = _holder(heartbeat).encode()
            os.ftruncate(descriptor, os.pwrite(descriptor, text, 0))
            time.sleep(TIMEOUT_S / 10)
        os._exit(0)
    (folder / _PID_FILE).write_text(str(pid))
    time.sleep(TIMEOUT_S / 10)
    return True


def end_elsewhere(folder: Path, fault: "Fault") -> None:
    """End that process. Its lock is what it leaves."""
    pid = int((folder / _PID_FILE).read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
