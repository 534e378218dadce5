"""Faults of files: damaged, replaced, on a disk that is full or write-protected.

A run's folder lies in a file system of its own (tmpfs, in a mount namespace of the run's process), where that can be
mounted: it is really full and really read-only then, for root too.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.campaign.setting import DATASET, OTHER_DATASET, run_of

if TYPE_CHECKING:
    from tests.faults.campaign.faults import Fault

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
DISK_BYTES = 48 << 20
_BALLAST = "ballast"
_AWAY = ".away"
_NEWNS, _NEWUSER = 0x20000, 0x10000000
_RDONLY, _REMOUNT, _REC, _PRIVATE = 1, 32, 16384, 1 << 18


def mount_disk(folder: Path) -> bool:
    """Give this process and its children a small file system of their own at `folder`; whether that could be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNS) != 0 and libc.unshare(_NEWNS | _NEWUSER) != 0:
        return False
    libc.mount(None, b"/", None, _REC | _PRIVATE, None)
    return bool(libc.mount(b"campaign", bytes(folder), b"tmpfs", 0, f"size={DISK_BYTES}".encode()) == 0)


def _remount(folder: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"campaign", bytes(folder.absolute()), b"tmpfs", _REMOUNT | flags, None) != 0:
        raise OSError(ctypes.get_errno(), f"cannot mount {folder} again")


def read_only(folder: Path, fault: "Fault") -> None:
    """Write-protect the file system of the run; what the campaign notes lies elsewhere."""
    _remount(folder, _RDONLY)


def writable(folder: Path, fault: "Fault") -> None:
    """And take that back."""
    _remount(folder, 0)


def fill(folder: Path, room: int) -> None:
    """Fill the file system of a folder up to so many bytes."""
    found = os.statvfs(folder)
    with (folder / _BALLAST).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - room))


def empty(folder: Path, fault: "Fault") -> None:
    """Make room again."""
    (run_of(folder) / _BALLAST).unlink(missing_ok=True)


def damage(path: Path, how: str, amount: float) -> None:
    """Flip a bit, cut a tail off, or make it zeros."""
    content = bytearray(path.read_bytes())
    place = int(amount * len(content))
    if how == "bit":
        content[place] ^= 1 << (place % 8)
    elif how == "cut":
        del content[place:]
    else:
        # Some of it was not zero before.
        place = min(place, max(index for index, byte in enumerate(content) if byte))
        content[place:] = bytes(len(content) - place)
    path.write_bytes(content)


def damage_checkpoint(folder: Path, fault: "Fault") -> bool:
    """Damage the newest checkpoint; whether there are two, so that one is left."""
    what, _, how = fault.kind.partition("_")
    manifests = sorted((run_of(folder) / "checkpoints").glob("*.manifest.json"), key=_step_of)
    if len(manifests) < 2:
        return False
    path = manifests[-1]
    if what == "checkpoint":
        path = path.with_name(path.name.replace(".manifest.json", ".ckpt"))
    damage(path, how, fault.amount)
    return True


def _step_of(manifest: Path) -> int:
    return int(manifest.name.removeprefix("step=").removesuffix(".manifest.json"))


def mix_times(folder: Path, fault: "Fault") -> None:
    """Let the oldest checkpoint seem the newest, as after a copy or a step of the clock."""
    for number, path in enumerate(sorted((run_of(folder) / "checkpoints").glob("*.manifest.json"), key=_step_of)):
        for file in (path, path.with_name(path.name.replace(".manifest.json", ".ckpt"))):
            if file.exists():
                os.utime(file, (2e9 - 1000 * number, 2e9 - 1000 * number))


def damage_chunk(folder: Path, fault: "Fault") -> None:
    """Damage one chunk of the dataset."""
    chunks = sorted((folder / DATASET).glob("*/*.bin"))
    number, amount = divmod(fault.amount * len(chunks), 1)
    path = chunks[int(number)]
    shutil.copy2(path, f"{path}{_AWAY}")
    damage(path, fault.kind.partition("_")[2], amount)


def mend_chunks(folder: Path, fault: "Fault") -> None:
    """Put undamaged chunks back."""
    for path in (folder / DATASET).glob(f"*/*{_AWAY}"):
        path.replace(path.with_name(path.name.removesuffix(_AWAY)))


def replace_dataset(folder: Path, fault: "Fault") -> bool:
    """Put another dataset in place of the one that is trained on; whether a checkpoint says which that was."""
    if fault.kind == "dataset_other" and not newest_whole(folder):
        return False
    (folder / DATASET).rename(folder / f"{DATASET}{_AWAY}")
    shutil.copytree(folder / OTHER_DATASET, folder / DATASET)
    return True


def mend_dataset(folder: Path, fault: "Fault") -> None:
    """Put the dataset back."""
    away = folder / f"{DATASET}{_AWAY}"
    if away.exists():
        shutil.rmtree(folder / DATASET)
        away.rename(folder / DATASET)


def newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint that is what its manifest says, found without the code under test; 0: none."""

    for manifest in sorted((run_of(folder) / "checkpoints").glob("*.manifest.json"), key=_step_of, reverse=True):
        try:
            said = json.loads(manifest.read_text())
            own_hash = said.pop("manifest_sha256")
            if own_hash != hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest():
                continue
            content = manifest.with_name(manifest.name.replace(".manifest.json", ".ckpt")).read_bytes()
            is_whole = (said["size_bytes"], said["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
            if is_whole and said["step"] == _step_of(manifest):
                return _step_of(manifest)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 0
