"""Third stage: ids to litdata chunks. A shard is one chunk, written by one thread, and depends on nothing else."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import TokensLoader
from litdata.streaming.writer import BinaryWriter

from muse_lightning.data.card import INDEX_NAME, ChunkEntry
from muse_lightning.data.encoding import EncodedPart
from muse_lightning.data.jobs import Job, Meter
from muse_lightning.errors import UserError
from muse_lightning.files import sha256_bytes, sha256_file

# litdata's offsets are uint32. A shard is cut long before this, so that it is always one chunk.
_LITDATA_CHUNK_BYTES = 2**32 - 1


@dataclass(frozen=True)
class ShardJob(Job):
    """Documents to write into one chunk."""

    index: int
    parts: list[Path]
    """Files of ids."""
    part: np.ndarray
    """int64 [documents]. The file of each document."""
    start: np.ndarray
    """int64 [documents]. Its first id there."""
    tokens: np.ndarray
    """int64 [documents]."""
    dtype: str
    key: str
    size: int

    def run(self, folder: Path, context: Any, meter: Meter) -> dict[str, Any]:
        writer = _ShardWriter(folder, self.index)
        itemsize = np.dtype(self.dtype).itemsize
        # litdata's chunk: number of items, where each begins and the last ends, the items.
        header_bytes = 4 * (len(self.part) + 2)
        ends = header_bytes + itemsize * np.cumsum(self.tokens)
        if ends[-1] > _LITDATA_CHUNK_BYTES:
            raise UserError("data.chunk_bytes: a chunk of 4 GiB or more cannot be written; make it smaller")
        digest = hashlib.sha256(np.array([len(self.part), header_bytes, *ends], dtype="<u4").tobytes())
        for row, (part, start, tokens) in enumerate(
            zip(self.part.tolist(), self.start.tolist(), self.tokens.tolist(), strict=True)
        ):
            ids = np.fromfile(self.parts[part], dtype=self.dtype, count=tokens, offset=start * itemsize)
            digest.update(ids.tobytes())
            writer.add_item(row, torch.from_numpy(ids))
        writer.done()
        # litdata leaves each writer's part of the index in a file of its own, to be merged.
        index = folder / f"{self.index}.{INDEX_NAME}"
        content = json.loads(index.read_text())
        index.unlink()
        (litdata_chunk,) = content["chunks"]
        path = folder / litdata_chunk["filename"]
        chunk = ChunkEntry(
            filename=path.name,
            sha256=digest.hexdigest(),
            size_bytes=int(ends[-1]),
            tokens=int(self.tokens.sum()),
            documents=len(self.part),
        )
        check_written(path, chunk)
        meter(self.size, 0, chunk.tokens)
        return {"chunk": asdict(chunk), "litdata_chunk": litdata_chunk, "config": content["config"]}


class _ShardWriter(BinaryWriter):
    """litdata's writer under a shard's number. Its own number is that of the process, which must not decide a file's
    name."""

    def __init__(self, folder: Path, shard: int) -> None:
        super().__init__(str(folder), chunk_bytes=_LITDATA_CHUNK_BYTES, item_loader=TokensLoader())
        self._shard = shard

    @property
    def rank(self) -> int:
        return self._shard


def check_written(path: Path, chunk: ChunkEntry) -> None:
    """Compare a chunk on the disk with what it should be.

    Raises:
        UserError: it is something else.
    """
    if path.stat().st_size != chunk.size_bytes or sha256_file(path) != chunk.sha256:
        raise UserError(
            f"data chunk {path}: the disk gives back other bytes than were written; check the disk, then prepare again"
        )


def shard_jobs(
    parts: Sequence[EncodedPart], tokens: np.ndarray, part: np.ndarray, shards: Sequence[np.ndarray], dtype: str
) -> Iterator[ShardJob]:
    """One job per shard.

    Args:
        parts: All ids.
        tokens: int64 [documents], of all documents in their order.
        part: int64 [documents]. The number of the part that holds each.
        shards: For each shard, in its order, its documents.
        dtype: Of the ids.
    """
    ends = np.cumsum(tokens)
    first_of_part = np.searchsorted(part, np.arange(len(parts)))
    starts = ends - tokens
    starts = starts - starts[first_of_part[part]]
    for index, rows in enumerate(shards):
        used, own = np.unique(part[rows], return_inverse=True)
        told = repr([index, dtype, [parts[number].folder.name for number in used]])
        key = told.encode() + starts[rows].tobytes() + tokens[rows].tobytes() + own.tobytes()
        yield ShardJob(
            index,
            [parts[number].ids for number in used],
            own,
            starts[rows],
            tokens[rows],
            dtype,
            sha256_bytes(key)[:32],
            int(tokens[rows].sum()),
        )
