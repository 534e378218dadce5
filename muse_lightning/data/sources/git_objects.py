"""A git object store, read by Python code alone, with a limit on whatever is unpacked.

dulwich finds objects in packs, applies deltas and parses revisions. The lengths that an object declares are looked at
before anything is unpacked, through all deltas it is made of.
"""

import hashlib
import os
import zlib
from collections.abc import Iterator

from dulwich.object_format import SHA1
from dulwich.object_store import BaseObjectStore
from dulwich.objects import ObjectID, RawObjectID

from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.sources.git_packs import BLOB, COMMIT, TAG, TREE, BrokenObjectError, Pack, broken_named
from muse_lightning.data.sources.local import read_regular

_KINDS = {b"commit": COMMIT, b"tree": TREE, b"blob": BLOB, b"tag": TAG}
_NAMES = {number: name for name, number in _KINDS.items()}


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
        self._packs: list[Pack] = []
        _refuse_links(folder, self._folder)
        packs = os.path.join(self._folder, "pack")
        for name in sorted(os.listdir(packs)) if os.path.isdir(packs) else ():
            if name.endswith(".idx"):
                try:
                    with broken_named(f"pack {name}"):
                        self._packs.append(Pack(os.path.join(packs, name)))
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

    def _find(self, name: bytes, limit: int = 0) -> "bytes | tuple[Pack, int]":
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
        raise DamagedSource("has no folder of objects")
    if os.path.lexists(os.path.join(objects, "info", "alternates")):
        raise DamagedSource("borrows objects of another repository; run `git repack -a -d` in it first")
    for place in (objects, os.path.join(objects, "pack")):
        links = [place] if os.path.islink(place) else []
        if not links and os.path.isdir(place):
            with os.scandir(place) as entries:
                links = [entry.path for entry in entries if entry.is_symlink()]
        if links:
            link = os.path.relpath(links[0], folder)
            raise DamagedSource(f"{link} is a link; objects are read from the repository's own folder only")


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
