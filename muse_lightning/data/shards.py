"""Documents to one litdata chunk: read, filter, encode, write. A shard is written by one process and depends on
nothing else."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import TokensLoader
from litdata.streaming.writer import BinaryWriter

from muse_lightning.data.card import INDEX_NAME, ChunkEntry
from muse_lightning.data.documents import Document
from muse_lightning.data.filters import Filters
from muse_lightning.data.selection import FileOrder, order_files
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.files import sha256_file

# Text given to the tokenizer at once: enough to keep its threads busy, little enough for their results.
_ENCODE_BYTES = 4 << 20
# litdata's offsets are uint32. A shard is cut long before this, so that it is always one chunk.
_LITDATA_CHUNK_BYTES = 2**32 - 1


@dataclass(frozen=True)
class ShardJob:
    """What one process needs to write one shard."""

    folder: Path
    index: int
    documents: list[Document]
    filters: Filters
    file_order: FileOrder
    seed: int


@dataclass
class ShardResult:
    """What was written. `chunk` and `config` are None when no file passed the filters."""

    chunk: ChunkEntry | None = None
    litdata_chunk: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    document_tokens: list[int] = field(default_factory=list)
    text_bytes: int = 0
    files: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class _ShardWriter(BinaryWriter):
    """litdata's writer under a shard's number. Its own number is that of the process, which must not decide a file's
    name."""

    def __init__(self, folder: Path, shard: int) -> None:
        super().__init__(str(folder), chunk_bytes=_LITDATA_CHUNK_BYTES, item_loader=TokensLoader())
        self._shard = shard

    @property
    def rank(self) -> int:
        return self._shard


def write_shard(
    job: ShardJob, tokenizer: Tokenizer, advance: Callable[[Document, int, int], None] | None = None
) -> ShardResult:
    """Write one shard.

    Args:
        job: The documents, and where to write them.
        tokenizer: Text to ids.
        advance: Called after each document with the document, its number of files and its number of tokens.
    """
    result = ShardResult()
    writer = _ShardWriter(job.folder, job.index)
    for document in job.documents:
        ids, files = encode_document(document, tokenizer, job.filters, job.file_order, job.seed, result.skipped)
        if files:
            writer.add_item(len(result.document_tokens), torch.from_numpy(ids))
            result.document_tokens.append(len(ids))
            result.text_bytes += int(tokenizer.token_bytes[ids].sum())
            result.files += files
        if advance is not None:
            advance(document, files, len(ids))
    if result.document_tokens:
        writer.done()
        # litdata leaves each writer's part of the index in a file of its own, to be merged.
        part = job.folder / f"{job.index}.{INDEX_NAME}"
        content = json.loads(part.read_text())
        part.unlink()
        result.config = content["config"]
        (result.litdata_chunk,) = content["chunks"]
        path = job.folder / result.litdata_chunk["filename"]
        result.chunk = ChunkEntry(
            filename=path.name,
            sha256=sha256_file(path),
            size_bytes=path.stat().st_size,
            tokens=sum(result.document_tokens),
            documents=len(result.document_tokens),
        )
    return result


def encode_document(
    document: Document,
    tokenizer: Tokenizer,
    filters: Filters,
    file_order: FileOrder,
    seed: int,
    skipped: Counter[str],
) -> tuple[np.ndarray, int]:
    """Read, filter and encode one document.

    The text is Qwen2.5-Coder's: `<|repo_name|>name`, newline; per file `<|file_sep|>path`, newline, content, and a
    newline unless the content ends in one; `<|endoftext|>`.

    Args:
        skipped: Files left out are counted here by reason.
    Returns:
        The ids (empty when no file was kept), and the number of files in them.
    """
    skipped.update(document.skipped)
    special = {name: np.array([index], dtype=tokenizer.dtype) for name, index in tokenizer.special_ids.items()}
    pieces = [special["repo_name"], *tokenizer.encode([_text(document.name) + b"\n"])]
    files = waiting_bytes = 0
    waiting: list[bytes] = []

    def flush() -> None:
        for ids in tokenizer.encode(waiting):
            pieces.extend((special["file_sep"], ids))
        waiting.clear()

    for file in order_files(document, file_order, seed):
        try:
            content = file.read()
        except OSError:
            skipped["unreadable"] += 1
            continue
        reason = filters.rejects_content(content)
        if reason is not None:
            skipped[reason] += 1
            continue
        files += 1
        waiting.append(_text(file.path) + b"\n" + content + (b"" if content.endswith(b"\n") else b"\n"))
        waiting_bytes += len(content)
        if waiting_bytes >= _ENCODE_BYTES:
            flush()
            waiting_bytes = 0
    flush()
    if not files:
        return np.empty(0, dtype=tokenizer.dtype), 0
    return np.concatenate([*pieces, special["end"]]), files


def _text(name: str) -> bytes:
    """A name as bytes; those that were not UTF-8 come back as they are on the disk."""
    return name.encode("utf-8", errors="surrogateescape")
