"""Objects in git packs: what each is made of, looked at before it is unpacked.

https://git-scm.com/docs/pack-format. dulwich reads the index and applies deltas.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dulwich.lru_cache import LRUSizeCache
from dulwich.object_format import SHA1
from dulwich.objects import RawObjectID
from dulwich.pack import PackIndex, apply_delta, load_pack_index

COMMIT, TREE, BLOB, TAG = 1, 2, 3, 4
_OFFSET_DELTA, _REFERENCE_DELTA = 6, 7
# git refuses to write longer chains (pack.c: 4,095).
_MAX_CHAIN = 4095
# What one link of a chain may unpack to: a text may once have been longer than it is now.
_MAX_PART = 64 << 20
_CACHE_BYTES = 32 << 20
_PIECE = 1 << 16


class BrokenObjectError(ValueError):
    """An object that is missing, damaged, or not what its name says."""


@contextmanager
def broken_named(what: str) -> Iterator[None]:
    """Whatever goes wrong with damaged bytes as a BrokenObjectError: libraries raise errors of a dozen kinds."""
    try:
        yield
    except BrokenObjectError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BrokenObjectError(f"{what} is damaged: {type(error).__name__} {reason[:200]}") from error


class _Entry(NamedTuple):
    """The head of an object in a pack."""

    kind: int
    size: int
    """Of what follows: of the object, or of the delta."""
    data: int
    """Offset of the packed bytes."""
    base: int
    """Offset of the object that a delta is against; 0 for a whole object."""


class _Chain(NamedTuple):
    """A packed object as what has to be unpacked for it, the whole object last."""

    entries: list[_Entry]
    size: int
    """Of the object in the end."""

    @property
    def kind(self) -> int:
        return self.entries[-1].kind


class Pack:
    """A pack and its index."""

    def __init__(self, index_path: str) -> None:
        pack_path = index_path.removesuffix(".idx") + ".pack"
        self._file = os.open(pack_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        self.index: PackIndex = load_pack_index(index_path, SHA1)
        # By the offset of the packed bytes.
        self._unpacked: LRUSizeCache[int, bytes] = LRUSizeCache(_CACHE_BYTES, compute_size=len)

    def close(self) -> None:
        os.close(self._file)
        self.index.close()

    def chain(self, offset: int) -> _Chain:
        """What the object at an offset is made of; its first delta is unpacked as far as the length it declares."""
        entries = [self._entry(offset)]
        while entries[-1].kind in (_OFFSET_DELTA, _REFERENCE_DELTA):
            if len(entries) > _MAX_CHAIN:
                raise BrokenObjectError("a chain of deltas is too long")
            entries.append(self._entry(entries[-1].base))
        size = entries[0].size if len(entries) == 1 else self._declared_by_delta(entries[0])
        return _Chain(entries, size)

    def unpack(self, chain: _Chain, limit: int) -> bytes:
        """The object's content.

        Raises:
            BrokenObjectError: it is longer than `limit`, or what it is made of is too long for a source text.
        """
        if chain.size > limit or any(entry.size > _MAX_PART for entry in chain.entries):
            raise BrokenObjectError(f"more than {limit:,} bytes have to be unpacked")
        last = len(chain.entries) - 1
        first = next((i for i, entry in enumerate(chain.entries) if entry.data in self._unpacked), last)
        start = chain.entries[first].data
        content = self._unpacked[start] if start in self._unpacked else self._inflate(chain.entries[first])
        for entry in reversed(chain.entries[:first]):
            self._unpacked[start] = content
            delta = self._inflate(entry)
            if _delta_sizes(delta)[1] > _MAX_PART:
                raise BrokenObjectError(f"more than {_MAX_PART:,} bytes have to be unpacked")
            content, start = b"".join(apply_delta(content, delta)), entry.data
        self._unpacked[start] = content
        return content

    def _entry(self, offset: int) -> _Entry:
        head = os.pread(self._file, 64, offset) if offset > 0 else b""
        kind, size, position = (head[0] >> 4) & 7, head[0] & 15, 0
        while head[position] & 0x80:
            position += 1
            size |= (head[position] & 0x7F) << (7 * position - 3)
        position += 1
        if kind in (COMMIT, TREE, BLOB, TAG):
            return _Entry(kind, size, offset + position, 0)
        if kind == _OFFSET_DELTA:
            distance = head[position] & 0x7F
            while head[position] & 0x80:
                position += 1
                distance = ((distance + 1) << 7) | (head[position] & 0x7F)
            # Bases come before, so that there is no cycle.
            if distance == 0:
                raise BrokenObjectError("a delta is against itself")
            return _Entry(kind, size, offset + position + 1, offset - distance)
        if kind == _REFERENCE_DELTA:
            base = self.index.object_offset(RawObjectID(head[position : position + 20]))
            return _Entry(kind, size, offset + position + 20, base)
        raise BrokenObjectError(f"an object of kind {kind}")

    def _declared_by_delta(self, entry: _Entry) -> int:
        packed = os.pread(self._file, 512, entry.data)
        return _delta_sizes(zlib.decompressobj().decompress(packed, 32))[1]

    def _inflate(self, entry: _Entry) -> bytes:
        unpacker = zlib.decompressobj()
        pieces, left, offset = [], entry.size, entry.data
        while left > 0 and not unpacker.eof:
            packed = unpacker.unconsumed_tail or os.pread(self._file, min(_PIECE, left + 64), offset)
            if not packed:
                raise BrokenObjectError("a pack ends within an object")
            offset += 0 if unpacker.unconsumed_tail else len(packed)
            pieces.append(unpacker.decompress(packed, left))
            left -= len(pieces[-1])
        if left:
            raise BrokenObjectError("an object is shorter than declared")
        return b"".join(pieces)


def _delta_sizes(delta: bytes) -> tuple[int, int]:
    """Lengths of what a delta applies to and of what it makes."""
    sizes, position = [], 0
    for _ in range(2):
        size = shift = 0
        while True:
            byte = delta[position]
            position += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        sizes.append(size)
    return sizes[0], sizes[1]
