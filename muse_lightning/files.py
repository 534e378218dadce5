"""Files that are either whole or absent: temporary name in the target folder, fsync, rename. All packages may import
this file."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from muse_lightning.errors import UserError, reason_of

PARTIAL = ".partial-"
"""In the name of what is being written, before a random suffix; the name begins with a dot."""
_SMALL = 1 << 20
"""Bytes of a file that is kept in memory while it is copied over."""
_CANNOT_RENAME = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV, errno.EINVAL}
"""What storage answers that has no such operation."""


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces of 1 MiB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_home(path: Path | str) -> Path:
    """A path as a user writes it, with a home folder in place of `~` or `~NAME`.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no user of this name has a home folder; give the whole path") from None


def is_file_name(text: str) -> bool:
    """Whether text, written by anybody, can be the name of a file in a folder, and of none outside."""
    length = len(text.encode("utf-8", "surrogatepass"))
    return 0 < length <= 255 and Path(text).name == text and "\0" not in text


def read_json(path: Path) -> Any:
    """Content of a JSON file that anybody may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def fsync_path(path: Path | str) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_names_of(folder: Path) -> None:
    """Flush the name of a folder, and of all above it on the same mount, to the disk, whoever made them: a power cut
    loses a folder with all that was flushed in it if its name was not.

    Raises:
        OSError: the storage is broken.
    """
    folder = folder.resolve()
    while not os.path.ismount(folder):
        folder = folder.parent
        try:
            fsync_path(folder)
        except OSError as error:
            # A folder that may not be read was hardly made for this, nor can it be flushed.
            if error.errno not in {*_CANNOT_RENAME, errno.EACCES}:
                raise


def atomic_write(path: Path, data: bytes | str, *, may_copy: bool = False) -> None:
    """Write a file so that a reader, or a kill at any instant, sees the old content or the new one, never a part.

    Args:
        path: The file to write or to replace. Its folder must exist.
        data: The whole content; text is encoded as UTF-8.
        may_copy: As of `atomic_file`.
    """
    with atomic_file(path, may_copy=may_copy) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path, *, may_copy: bool = False) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the `with` block ends without an error, and is on the disk then.

    Args:
        path: The file to write or to replace. Its folder must exist.
        may_copy: Where the storage can rename nothing, as mounted buckets, copy instead. A kill leaves a part then:
            only for a file whose readers know a part when they see it.
    Yields:
        A temporary file beside it, open for writing in bytes.
    Raises:
        OSError: the storage does not take it; `path` is as it was.
    """
    # In the target's own folder: a rename across file systems would be a copy, which can be torn.
    temporary = path.with_name(f".{path.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except OSError as error:
            if not may_copy or error.errno not in _CANNOT_RENAME:
                raise
            _copy_over(temporary, path)
            temporary.unlink()
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    try:
        fsync_path(path.parent)
    except OSError as error:
        if not may_copy or error.errno not in _CANNOT_RENAME:
            raise


def _copy_over(source: Path, path: Path) -> None:
    """Copy, and flush; on an error, what was there before comes back if it is small, and nothing else is left."""
    is_small = path.exists() and path.stat().st_size <= _SMALL
    before = path.read_bytes() if is_small else None
    try:
        shutil.copyfile(source, path)
        fsync_path(path)
    except OSError:
        with suppress(OSError):
            if before is None:
                path.unlink()
            else:
                path.write_bytes(before)
                fsync_path(path)
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the `with` block ends without an error.

    Yields:
        An empty temporary folder beside `path`. On success everything in it is flushed to the disk and it takes the
        place of `path` (a folder of that name is removed). On an error it is deleted and `path` stays as it was.

    Leftovers of killed builds of the same folder are removed first, so at most one process may build it: hold
    `exclusive_lock(path)`.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    suffix = uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.name}{PARTIAL}{suffix}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync_path(os.path.join(folder, name))
            fsync_path(folder)
        if path.exists():
            # A folder cannot be renamed onto a non-empty one. A kill between the two renames leaves no folder, never a
            # mixed one.
            replaced = path.with_name(f".{path.name}{PARTIAL}{suffix}-replaced")
            os.rename(path, replaced)
            os.rename(temporary, path)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)


@contextmanager
def new_directory(path: Path, key: str) -> Iterator[Path]:
    """A folder that appears under its name only when the `with` block ends without an error, and replaces nothing.

    Args:
        path: a name that is free, or an empty folder. Held by a lock until the block ends.
        key: the option that names it, for messages.
    Yields:
        An empty temporary folder, as `atomic_directory`.
    Raises:
        UserError: there is something under that name, now or when the block ends, or it cannot be written.
    """
    _check_free(path, key)
    try:
        with exclusive_lock(path):
            _check_free(path, key)  # Who held the lock before may have made it.
            with atomic_directory(path) as temporary:
                yield temporary
                _check_free(path, key)
    except OSError as error:
        raise UserError(f"{key}: cannot write {path}: {reason_of(error)}") from error


def _check_free(path: Path, key: str) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{key}: {path} exists already; give a new folder")


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of `path`, and hold it during the `with` block.

    The lock is an flock on `.<name>.lock` beside `path`; the kernel frees it when its holder dies. The file is removed
    at the end of the block, and if that is an error, so are the folders above it that were made here.

    Raises:
        UserError: the folder that holds `path` cannot be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    with new_folders_removed_on_error(path.parent):
        try:
            descriptor = _open_locked(lock)
        except OSError as error:
            raise UserError(
                f"cannot write in {path.parent}: {error.strerror}; choose a folder that can be written"
            ) from error
        try:
            yield
        finally:
            _remove(lock)
            os.close(descriptor)


@contextmanager
def new_folders_removed_on_error(folder: Path) -> Iterator[None]:
    """Of a folder and those above it, remove what is made during the `with` block, if that ends with an error and
    nothing is in them."""
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in absent:
            with suppress(OSError):  # not made, or something is in it
                each.rmdir()
        raise


def _remove(lock: Path) -> None:
    """Remove a lock file that this process holds: who waits for it makes a new one."""
    with suppress(OSError):
        lock.unlink()


def _open_locked(lock: Path) -> int:
    """Descriptor of the lock file, locked."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The holder before may have removed the file: a lock on what has no name keeps nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)
