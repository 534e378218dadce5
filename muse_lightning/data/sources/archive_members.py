"""Members of tar and zip archives, one after the other, never extracted to disk.

Names are labels: nothing is opened by them. A member that `tarfile` or `zipfile` would have to follow (a link, a
device, a sparse file) has no content here.
"""

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, NamedTuple, cast

from muse_lightning.data.documents import DamagedSource, ReadLimits
from muse_lightning.data.sources.local import clean_path
from muse_lightning.data.sources.raw_files import open_raw
from muse_lightning.data.sources.unpacking import BoundedStream, damage_named, open_unpacked, unpacked_limit

# Headers of one member: long names, extended attributes. GNU tar and pax writers stay far below.
_MAX_HEADER_BYTES = 1 << 20
# zipfile holds a zip's directory in memory, 46 bytes and the name of each member, as ten times as many bytes.
_MAX_DIRECTORY_BYTES = 64 << 20


class Member(NamedTuple):
    """One entry of an archive."""

    path: str | None
    """Its path with "." and double slashes removed; None where that is absolute, leaves the archive's root, or is
    longer than a path can be."""
    kind: str
    """file, folder, or the reason why it has no content."""
    size: int
    read: Callable[[], bytes]
    """Its content. To be called before the next member is asked for, for files of at most `max_file_bytes`. Raises
    OSError where this member alone is unreadable."""


@contextmanager
def open_members(location: str, limits: ReadLimits) -> Iterator[Iterator[Member]]:
    """The members of an archive, in stored order.

    Raises:
        DamagedSource: it is gone, no archive, corrupt or truncated, or passes one of the limits. While the members are
            consumed, too.
        UserError: the disk fails.
    """
    with damage_named(location), open_raw(location, is_local=True) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        is_zip = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
        file.seek(0)
        members = _zip_members(file, size, limits) if is_zip else _tar_members(file, size, limits)
        yield _counted(members, limits.max_members)


def _counted(members: Iterator[Member], limit: int) -> Iterator[Member]:
    for number, member in enumerate(members):
        if number >= limit:
            raise DamagedSource(f"has more than {limit:,} members")
        yield member


class _TarStream(BoundedStream):
    """What tarfile reads of an archive: headers, within a budget per member, and nothing of the contents."""

    def __init__(self, file: IO[bytes], size: int, limits: ReadLimits) -> None:
        super().__init__(
            open_unpacked(file), unpacked_limit(size, limits), max(limits.max_file_bytes, _MAX_HEADER_BYTES)
        )
        self.header_bytes = 0

    def read(self, size: int) -> bytes:
        data = super().read(size)
        self.header_bytes += len(data)
        if self.header_bytes > _MAX_HEADER_BYTES:
            raise DamagedSource(f"has a header of more than {_MAX_HEADER_BYTES:,} bytes")
        return data

    def content(self, size: int) -> bytes:
        data = super().read(size)
        if len(data) < size:
            raise DamagedSource("ends within a member")
        return data


def _tar_members(file: IO[bytes], size: int, limits: ReadLimits) -> Iterator[Member]:
    stream = _TarStream(file, size, limits)
    try:
        with tarfile.TarFile(fileobj=cast(IO[bytes], stream), errors="surrogateescape") as archive:
            while (entry := archive.next()) is not None:
                # tarfile keeps every header it has seen.
                archive.members = []  # type: ignore[attr-defined]
                yield Member(clean_path(entry.name), _tar_kind(entry), entry.size, partial(stream.content, entry.size))
                stream.header_bytes = 0
    except (tarfile.TarError, RecursionError) as error:
        raise DamagedSource(f"is no readable archive: {error}") from error
    # tarfile takes a broken header for the end.
    if stream.last.strip(b"\0"):
        raise DamagedSource(f"has a broken header near byte {stream.tell():,}")
    stream.drain()


def _tar_kind(entry: tarfile.TarInfo) -> str:
    if entry.issym() or entry.islnk():
        return "symlink"
    if entry.isdir():
        return "folder"
    return "file" if entry.isreg() and not entry.issparse() else "special"


class _DirectoryFile:
    """A file for zipfile, which reads the whole directory at once: longer reads than a limit are refused."""

    def __init__(self, file: IO[bytes], limit_at_once: int) -> None:
        self._file = file
        self._limit_at_once = limit_at_once
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > self._limit_at_once:
            raise DamagedSource(f"has a directory of more than {self._limit_at_once:,} bytes")
        return self._file.read(size)


def _zip_members(file: IO[bytes], size: int, limits: ReadLimits) -> Iterator[Member]:
    limited = _DirectoryFile(file, _MAX_DIRECTORY_BYTES)
    try:
        with zipfile.ZipFile(cast(IO[bytes], limited)) as archive:
            entries = archive.infolist()
            limit = unpacked_limit(size, limits)
            if sum(entry.file_size for entry in entries) > limit:
                raise DamagedSource(f"unpacks to more than {limit:,} bytes")
            for entry in entries:
                yield Member(
                    clean_path(_zip_name(entry)),
                    _zip_kind(entry),
                    entry.file_size,
                    partial(_content, archive, entry),
                )
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DamagedSource(f"is no readable archive: {error}") from error


def _zip_name(entry: zipfile.ZipInfo) -> str:
    """Names without the flag for UTF-8 are decoded by zipfile as code page 437, which has a character for every byte;
    most tools write UTF-8 all the same."""
    name = entry.orig_filename.partition("\0")[0]
    return name if entry.flag_bits & 0x800 else os.fsdecode(name.encode("cp437"))


def _zip_kind(entry: zipfile.ZipInfo) -> str:
    if entry.is_dir():
        return "folder"
    mode = entry.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "symlink"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "special"
    # Encrypted, or a method that zipfile does not unpack in bounded memory.
    plain = not entry.flag_bits & 0x1 and entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return "file" if plain else "unreadable"


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(entry) as member:
            # One byte more than declared: the checksum is compared at the end of the member.
            data = member.read(entry.file_size + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise OSError(f"{entry.filename}: {error}") from error
    if len(data) != entry.file_size:
        raise OSError(f"{entry.filename}: {len(data):,} bytes found, {entry.file_size:,} declared")
    return data
