"""Decompression under limits: what a stream unpacks to is read forwards, in bounded pieces, up to a budget."""

import bz2
import errno
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Protocol, cast

from muse_lightning.data.documents import DamagedSource, ReadLimits
from muse_lightning.data.sources.raw_files import cannot_read
from muse_lightning.errors import UserError, reason_of

_PIECE = 1 << 16
# What liblzma may take for a dictionary that the stream asks for; `xz -9` needs 65 MiB.
_XZ_MEMORY = 128 << 20
# The same for zstd (its default limit; `zstd --ultra -22` needs 128 MiB).
_ZSTD_WINDOW = 128 << 20
# Small archives may be all of one repeated line; the ratio counts from here on.
_RATIO_FROM = 64 << 20

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Readable(Protocol):
    """Bytes one after the other."""

    def read(self, size: int, /) -> bytes: ...


class BoundedStream:
    """A stream that is read forwards only and refuses to give more bytes than a limit, at once or in all.

    It has what `tarfile` needs of a file, and no more.
    """

    def __init__(self, stream: Readable, limit: int, limit_at_once: int) -> None:
        self._stream = stream
        self._limit = limit
        self._limit_at_once = limit_at_once
        self._position = 0
        self._last = b""

    @property
    def last(self) -> bytes:
        """What the latest `read` returned."""
        return self._last

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._limit_at_once:
            raise DamagedSource(f"asks for {size:,} bytes at once, {self._limit_at_once:,} are allowed")
        pieces = []
        while size > 0 and (piece := self._take(size)):
            pieces.append(piece)
            size -= len(piece)
        self._last = b"".join(pieces)
        return self._last

    def seek(self, position: int) -> int:
        # tarfile looks at the byte before the next header, to see that the file goes on until there.
        if position < self._position:
            raise DamagedSource("asks to be read backwards")
        while self._position < position and self._take(position - self._position):
            pass
        return self._position

    def drain(self) -> None:
        """Read to the end, so that every checksum is compared."""
        while self._take(_PIECE):
            pass

    def _take(self, size: int) -> bytes:
        piece = self._stream.read(min(size, _PIECE))
        self._position += len(piece)
        if self._position > self._limit:
            raise DamagedSource(f"unpacks to more than {self._limit:,} bytes")
        return piece


class _XzReader(io.RawIOBase):
    """An xz stream; `lzma.LZMAFile` has no limit on the memory that a header may ask for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # any writable buffer, a type of Python 3.12
        while True:
            data = b""
            if self._decompressor.eof:
                # Another stream may follow, after zeros as padding.
                data = self._decompressor.unused_data.lstrip(b"\0")
                while not data:
                    piece = self._file.read(_PIECE)
                    if not piece:
                        return 0
                    data = piece.lstrip(b"\0")
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            elif self._decompressor.needs_input:
                data = self._file.read(_PIECE)
                if not data:
                    raise EOFError("the file ends too early")
            unpacked = self._decompressor.decompress(data, max_length=len(buffer))
            if unpacked:
                buffer[: len(unpacked)] = unpacked
                return len(unpacked)


def ratio_limit(packed_bytes: int, limits: ReadLimits) -> int:
    """How many bytes a file of this length may unpack to by the ratio alone."""
    return max(packed_bytes * limits.max_ratio, _RATIO_FROM)


def unpacked_limit(packed_bytes: int, limits: ReadLimits) -> int:
    """How many bytes an archive of this length may unpack to."""
    return min(limits.max_unpacked_bytes, ratio_limit(packed_bytes, limits))


def open_unpacked(file: IO[bytes]) -> Readable:
    """The decompressed content of an open file, whatever its name says: gzip, bzip2, xz, zstd, or as it is."""
    head = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, file))
    start = head.peek(8)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")
    if kind == "gzip":
        return gzip.GzipFile(fileobj=head)
    if kind == "bzip2":
        return bz2.BZ2File(head)
    if kind == "xz":
        return io.BufferedReader(_XzReader(head))
    if kind == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise UserError("zstd files need the package zstandard: pip install 'muse-lightning[tables]'") from error
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(head, read_across_frames=True)
    return head


@contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Errors of decompression as one line. Who reports a damaged unit adds its name.

    Args:
        what: Name of the file, for errors that are no damage.
    Raises:
        DamagedSource: the content is damaged.
        UserError: this machine fails: no space, memory or process is left.
    """
    try:
        yield
    except DamagedSource:
        raise
    except OSError as error:
        # Decompressors raise it without a number; a damaged length may lead to a place that there is not (EINVAL).
        if error.errno not in (None, errno.EINVAL):
            raise cannot_read(what, error) from error
        raise DamagedSource(f"is damaged: {reason_of(error)}") from error
    except (EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        raise DamagedSource(f"is damaged: {reason_of(error)}") from error
    except Exception as error:
        # zstandard is imported only where it is used, so that its error cannot be named here.
        if type(error).__name__ != "ZstdError":
            raise
        raise DamagedSource(f"is damaged: {reason_of(error)}") from error
