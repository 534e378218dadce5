"""Prepared datasets that lie elsewhere: found through fsspec, copied chunk by chunk into a folder of bounded size.

litdata's own downloader trusts what it gets, evicts by counting readers in files, and reads nothing but Parquet from
hf://; and a file in its cache belongs to one run.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fsspec.callbacks import Callback

from muse_lightning.data.block_reader import Chunk, Chunks
from muse_lightning.data.card import CARD_NAME, INDEX_NAME, TOKENIZER_NAME, ChunkEntry, read_card
from muse_lightning.data.filesystems import filesystem
from muse_lightning.errors import UserError, reason_of, shown_url
from muse_lightning.files import exclusive_lock, sha256_bytes, sha256_file

_SPLITS = ("train", "val", "test")
_OPENING_ATTEMPTS = 5
# A card has some 300 bytes for a chunk.
_MAX_DESCRIPTION_BYTES = 1 << 30
_MAX_TOKENIZER_BYTES = 1 << 28
_SECONDS_BETWEEN_LOOKS = 0.05
_SHA256 = re.compile("[0-9a-f]{64}")


class ChunkCache:
    """A folder of chunk files named by their SHA-256, at most `max_bytes` of them. Processes of one machine share it,
    and datasets too: a dataset that has moved is not fetched again."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """
        Args:
            folder: Made if missing.
            max_bytes: Of all files, those being fetched included. What has been removed but is still open in a process
                is freed when that closes it: one chunk of each dataset for each process.
        """
        self.folder = folder
        self.max_bytes = max_bytes

    def fetch(self, url: str, entry: ChunkEntry) -> Path:
        """The path of a chunk, downloaded and checked if it is not there. The chunks that were asked for longest ago
        make room for it.

        Raises:
            UserError: it cannot be read, it is not what the card describes, or it is larger than the whole cache.
        """
        if not _SHA256.fullmatch(entry.sha256):  # it becomes a file's name
            raise UserError(
                f"data chunk {shown_url(url)}: its SHA-256 in {CARD_NAME} is {entry.sha256[:80]!r}, which is none"
            )
        path = self.folder / f"{entry.sha256}.bin"
        if _touched(path):
            return path
        with exclusive_lock(self.folder / entry.sha256[:2]):
            if not _touched(path):
                self._download(url, entry, path)
        return path

    def _download(self, url: str, entry: ChunkEntry, path: Path) -> None:
        partial, room = path.with_suffix(".partial"), path.with_suffix(".room")
        while (reservation := self._take_room(entry, room)) is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)  # what others are fetching will be chunks that can be removed
        try:
            copy_file(url, partial, entry.size_bytes)
            found = sha256_file(partial)
            if found != entry.sha256:
                raise UserError(
                    f"data chunk {shown_url(url)} is damaged: its SHA-256 is {found[:12]}... instead of "
                    f"{entry.sha256[:12]}...; upload the dataset again"
                )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
            room.unlink(missing_ok=True)
            os.close(reservation)

    def _take_room(self, entry: ChunkEntry, room: Path) -> int | None:
        """Reserve a chunk's space: a file of its length, which other downloads count, open and locked as long as the
        download lives. None where chunks that nobody is fetching would not make enough room."""
        if entry.size_bytes > self.max_bytes:
            raise UserError(
                f"data.cache_bytes: {self.max_bytes:,} found, at least {entry.size_bytes:,} expected: one chunk of the "
                "dataset; several times that keeps workers from fetching again"
            )
        with exclusive_lock(self.folder / "room"):
            files = [file for file in sorted(self._files()) if not _is_abandoned(file[2])]
            excess = sum(size for _, size, _ in files) + entry.size_bytes - self.max_bytes
            removed = []
            for _, size, path in files:
                if excess <= 0:
                    break
                if path.suffix == ".bin":
                    removed.append(path)
                    excess -= size
            if excess > 0:
                return None
            for path in removed:
                path.unlink(missing_ok=True)
            reservation = os.open(room, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(reservation, fcntl.LOCK_EX)
            os.ftruncate(reservation, entry.size_bytes)
            return reservation

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of each file."""
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # a download has just ended
                if path.suffix in (".bin", ".room"):
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path


def _is_abandoned(path: Path) -> bool:
    """Whether a reservation's download was killed; then what it left is removed. The kernel freed its lock."""
    if path.suffix != ".room":
        return False
    try:
        file = path.open("rb")
    except FileNotFoundError:  # its download has just ended
        return True
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.with_suffix(".partial").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return True


class CachedChunks(Chunks):
    """The chunks of a split that lies at a URL."""

    def __init__(self, url: str, cache: ChunkCache) -> None:
        self.url = url
        self.cache = cache

    def fetch(self, entry: ChunkEntry) -> Path:
        """The path of a chunk's copy.

        Raises:
            UserError: see ChunkCache.fetch.
        """
        return self.cache.fetch(f"{self.url}/{entry.filename}", entry)

    def open(self, entry: ChunkEntry, dtype: str) -> Chunk:
        for _ in range(_OPENING_ATTEMPTS):
            path = self.fetch(entry)
            try:
                return Chunk(path, entry, dtype)
            except UserError:
                # Removed by another process for its own chunk, or rotten on this disk.
                path.unlink(missing_ok=True)
        raise UserError(
            f"data chunk {shown_url(self.url)}/{entry.filename}: its copy in {self.cache.folder} does not last until "
            "it is read; give a larger data.cache_bytes or another data.cache_dir"
        )


class _AtMost(Callback):
    """Ends a download that goes on for longer than it may."""

    def __init__(self, url: str, limit: int) -> None:
        super().__init__()
        self._url = url
        self._limit = limit

    def check(self, size: int) -> None:
        if size > self._limit:
            raise UserError(
                f"{shown_url(self._url)}: more than {self._limit:,} bytes found, at most these expected; upload it "
                "again"
            )

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self.check(self.value)


def copy_file(url: str, target: Path, limit: int) -> None:
    """Copy one file to this machine.

    Args:
        url: The file.
        target: Its place here.
        limit: Bytes that it may have.
    Raises:
        UserError: it cannot be read or written, or is longer.
    """
    system, path = filesystem(url)
    expected = _AtMost(url, limit)
    try:
        # What is said beforehand, on the way, and what came: not every file system tells the first two.
        expected.check(system.info(path).get("size") or 0)
        system.get_file(path, str(target), callback=expected)
        expected.check(target.stat().st_size)
    except UserError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"{shown_url(url)}: cannot be read: {reason_of(error)}") from error


def copy_description(url: str, cache_dir: Path) -> Path:
    """Copy what describes a dataset: dataset.json, and index.json of each split.

    Returns:
        The folder of the copies.
    Raises:
        UserError: there is no dataset.json, or one of them cannot be read.
    """
    folder = cache_dir / f"dataset-{sha256_bytes(url.encode())[:16]}"
    with exclusive_lock(folder):
        _replace_copy(f"{url}/{CARD_NAME}", folder / CARD_NAME, _MAX_DESCRIPTION_BYTES)
        for split in _SPLITS:
            if split in read_card(folder).splits:
                index = f"{split}/{INDEX_NAME}"
                _replace_copy(f"{url}/{index}", folder / index, _MAX_DESCRIPTION_BYTES)
    return folder


def copy_tokenizer(url: str, cache_dir: Path) -> Path:
    """Copy a tokenizer: the file that the URL names, or that of the dataset that it names.

    Raises:
        UserError: it cannot be read.
    """
    file = url if url.endswith(".json") else f"{url.rstrip('/')}/{TOKENIZER_NAME}"
    path = cache_dir / f"tokenizer-{sha256_bytes(file.encode())[:16]}.json"
    with exclusive_lock(path):
        _replace_copy(file, path, _MAX_TOKENIZER_BYTES)
    return path


def _replace_copy(url: str, target: Path, limit: int) -> None:
    """Copy a file in place of one that other ranks may be reading. What is refused leaves nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial-copy")
    try:
        copy_file(url, partial, limit)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
        # Files are in it, if it is not the first.
        with suppress(OSError):
            target.parent.rmdir()


def _touched(path: Path) -> bool:
    """Mark a file as just used, if it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
