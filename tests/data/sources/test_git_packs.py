"""Packs that git would not write."""

import hashlib
import struct
import zlib
from pathlib import Path

import pytest
from dulwich.pack import write_pack_index_v2

from muse_lightning.data.sources.git_packs import BLOB, BrokenObjectError, Pack, broken_named

OID = b"\x11" * 20


def pack(folder: Path, head: bytes, content: bytes) -> Pack:
    """A pack of one object, called `OID`, at offset 12."""
    body = struct.pack(">4sLL", b"PACK", 2, 1) + head + zlib.compress(content)
    digest = hashlib.sha1(body).digest()
    (folder / "a.pack").write_bytes(body + digest)
    with open(folder / "a.idx", "wb") as file:
        write_pack_index_v2(file, [(OID, 12, 0)], digest)
    return Pack(str(folder / "a.idx"))


def test_a_whole_object(tmp_path):
    found = pack(tmp_path, bytes([BLOB << 4 | 5]), b"12345")
    chain = found.chain(12)
    assert (chain.kind, chain.size) == (BLOB, 5)
    assert found.unpack(chain, 5) == b"12345"
    with pytest.raises(BrokenObjectError, match="more than 4 bytes"):
        found.unpack(chain, 4)


def test_a_delta_against_itself_ends(tmp_path):
    found = pack(tmp_path, bytes([7 << 4 | 4]) + OID, b"\x05\x05\x90\x05")
    with pytest.raises(BrokenObjectError, match="chain of deltas is too long"):
        found.chain(12)


def test_a_declared_length_is_not_allocated(tmp_path):
    # 4 GiB in the head, five bytes behind it.
    found = pack(tmp_path, bytes([0x80 | BLOB << 4, 0x80, 0x80, 0x80, 0x80, 0x01]), b"12345")
    chain = found.chain(12)
    assert chain.size == 1 << 32
    with pytest.raises(BrokenObjectError, match="more than 1,000 bytes"):
        found.unpack(chain, 1000)


def test_an_object_that_is_shorter_than_declared(tmp_path):
    found = pack(tmp_path, bytes([BLOB << 4 | 9]), b"12345")
    with pytest.raises(BrokenObjectError), broken_named("object"):
        found.unpack(found.chain(12), 100)
