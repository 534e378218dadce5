"""A git object store, read by Python code alone, with a limit on whatever is unpacked.

dulwich finds objects in packs, applies deltas and parses revisions. The lengths that an object declares are looked at
before anything is unpacked, through all deltas it is made of.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dulwich.lru_cache import LRUSizeCache
from dulwich.object_format import SHA1
from dulwich.object_store import BaseObjectStore
from dulwich.objects import ObjectID, RawObjectID
from dulwich.pack import PackIndex, apply_delta, load_pack_index

from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.sources.local import read_regular

COMMIT, TREE, BLOB, TAG = 1, 2, 3, 4
_OFFSET_DELTA, _REFERENCE_DELTA = 6, 7
_KINDS = {b"commit": COMMIT, b"tree": TREE, b"blob": BLOB, b"tag": TAG}
_NAMES = {number: name for name, number in _KINDS.items()}
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


class _Pack:
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
        """https://git-scm.com/docs/pack-format"""
        head = os.pread(self._file, 64, offset) if offset > 0 else b""
        kind, size, position = (head[0] >> 4) & 7, head[0] & 15, 0
        while head[position] & 0x80:
            position += 1
            size |= (head[position] & 0x7F) << (7 * position - 3)
        position += 1
        if kind in _NAMES:
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


class GitObjects(BaseObjectStore):
    """The objects of one repository. Alternates, where a store borrows objects from elsewhere, are refused.

    dulwich's functions that read revisions take it as their object store.
    """

    def __init__(self, folder: str, limit: int) -> None:
        """
        Args:
            folder: The repository's .git, or a bare repository.
            limit: Bytes that one object may unpack to when it is read by dulwich.
        Raises:
            DamagedSource: it is gone, borrows objects, or has links in it.
        """
        super().__init__(object_format=SHA1)
        self._folder = os.path.join(folder, "objects")
        self._limit = limit
        self._packs: list[_Pack] = []
        _refuse_links(folder, self._folder)
        packs = os.path.join(self._folder, "pack")
        for name in sorted(os.listdir(packs)) if os.path.isdir(packs) else ():
            if name.endswith(".idx"):
                try:
                    with broken_named(f"{folder}: pack {name}"):
                        self._packs.append(_Pack(os.path.join(packs, name)))
                except BrokenObjectError as error:
                    raise DamagedSource(str(error)) from error

    def close(self) -> None:
        for pack in self._packs:
            pack.close()

    def look(self, name: bytes) -> tuple[int, int]:
        """Kind and length of an object, by its 40 digits; nothing is unpacked but a few bytes.

        Raises:
            BrokenObjectError: it is missing or damaged.
        """
        with broken_named("object"):
            found = self._find(name)
            if isinstance(found, bytes):
                kind, size, _ = _loose_head(zlib.decompressobj().decompress(found, 64))
                return kind, size
            chain = found[0].chain(found[1])
            return chain.kind, chain.size

    def read(self, name: bytes, limit: int) -> tuple[int, bytes]:
        """Kind and content of an object, which its name is compared with.

        Raises:
            BrokenObjectError: it is missing, damaged, or more than `limit` bytes long.
        """
        with broken_named("object"):
            found = self._find(name, limit)
            if isinstance(found, bytes):
                kind, content = _loose_content(found, limit)
            else:
                chain = found[0].chain(found[1])
                kind, content = chain.kind, found[0].unpack(chain, limit)
            head = b"%s %d\0" % (_NAMES[kind], len(content))
            if hashlib.sha1(head + content, usedforsecurity=False).hexdigest().encode() != name:
                raise BrokenObjectError("the content is not what the name says")
            return kind, content

    def _find(self, name: bytes, limit: int = 0) -> "bytes | tuple[_Pack, int]":
        """A loose object's packed bytes (its first, where only its head is wanted), or a place in a pack."""
        digits = name.decode("ascii")
        path = os.path.join(self._folder, digits[:2], digits[2:])
        if os.path.lexists(path):
            # Packed by zlib, which adds at most a few bytes to what it cannot make shorter.
            packed = read_regular(path, limit + limit // 100 + 1024) if limit else _first_bytes(path)
            if packed is None:
                raise BrokenObjectError(f"more than {limit:,} bytes have to be unpacked")
            return packed
        for pack in self._packs:
            try:
                return pack, pack.index.object_offset(ObjectID(name))
            except KeyError:
                continue
        raise BrokenObjectError(f"{digits} is missing")

    # What dulwich asks of a store.

    def get_raw(self, name: "RawObjectID | ObjectID") -> tuple[int, bytes]:
        try:
            return self.read(name.hex().encode() if len(name) == 20 else name, self._limit)
        except BrokenObjectError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[ObjectID]:
        for folder in sorted(os.listdir(self._folder)):
            if len(folder) == 2:
                names = os.listdir(os.path.join(self._folder, folder))
                yield from (ObjectID(f"{folder}{name}".encode()) for name in names)
        for pack in self._packs:
            yield from pack.index


def _refuse_links(folder: str, objects: str) -> None:
    if not os.path.isdir(objects):
        raise DamagedSource(f"{folder}: no folder of objects")
    if os.path.lexists(os.path.join(objects, "info", "alternates")):
        raise DamagedSource(f"{folder} borrows objects of another repository; run `git repack -a -d` in it first")
    for place in (objects, os.path.join(objects, "pack")):
        links = [place] if os.path.islink(place) else []
        if not links and os.path.isdir(place):
            with os.scandir(place) as entries:
                links = [entry.path for entry in entries if entry.is_symlink()]
        if links:
            raise DamagedSource(f"{links[0]} is a link; objects are read from the repository's own folder only")


def _first_bytes(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        return file.read(512) or b""


def _loose_head(data: bytes) -> tuple[int, int, int]:
    """Kind, length, and where the content begins."""
    head, end, _ = data.partition(b"\0")
    name, _, size = head.partition(b" ")
    if not end or not size.isdigit():
        raise BrokenObjectError("a loose object has no head")
    return _KINDS[name], int(size), len(head) + 1


def _loose_content(packed: bytes, limit: int) -> tuple[int, bytes]:
    data = zlib.decompressobj().decompress(packed, limit + 64)
    kind, size, start = _loose_head(data[:64])
    if size > limit or len(data) - start != size:
        raise BrokenObjectError("a loose object is not as long as it says")
    return kind, data[start:]


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
