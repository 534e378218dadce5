"""From finished shards to the folder of a dataset: indices, tokenizer, card; all of it checked on the disk."""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import litdata
import numpy as np

import muse_lightning
from muse_lightning.data.building import Built
from muse_lightning.data.card import (
    CARD_NAME,
    INDEX_NAME,
    TOKENIZER_NAME,
    ChunkEntry,
    DatasetCard,
    SplitEntry,
    check_index,
    content_fingerprint,
    long_document_share,
    read_card,
)
from muse_lightning.data.choosing import read_paths
from muse_lightning.data.inventory import revisions
from muse_lightning.data.left_out import LeftOut, write_left_out
from muse_lightning.data.selection import DROPPED, SPLITS
from muse_lightning.data.shards import check_written
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.files import atomic_write, sha256_bytes

_ROWS_AT_ONCE = 1 << 16


def assemble(
    folder: Path,
    built: Built,
    identities: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    tokenizer_name: str,
    inputs: dict[str, Any],
    num_workers: int,
) -> DatasetCard:
    """Fill an empty folder with a dataset, and check every chunk against the card.

    Raises:
        UserError: the disk gives back something else than was written.
    """
    splits = {}
    for name, shards in built.shards.items():
        (folder / name).mkdir()
        for shard, result in shards:
            _place(shard / result["chunk"]["filename"], folder / name)
        rows = built.split == SPLITS.index(name)
        splits[name] = _write_index(folder / name, [result for _, result in shards], built.encoded[rows])
    tokenizer_json = tokenizer.to_json()
    if tokenizer_json is not None:
        atomic_write(folder / TOKENIZER_NAME, tokenizer_json)
    write_left_out(folder, [pack.left_out for pack in built.reading.packs], _repeated(built))
    card = _card(built, splits, identities, tokenizer, tokenizer_name, inputs)
    atomic_write(folder / CARD_NAME, card.to_json())
    _verify(folder, num_workers)
    return card


def _repeated(built: Built) -> Iterator[LeftOut]:
    """The duplicates, as they are listed."""
    contents = [pack.content for pack in built.reading.packs]
    repeated = built.documents.repeated
    for start in range(0, len(repeated["name"]), _ROWS_AT_ONCE):
        rows = {column: values[start : start + _ROWS_AT_ONCE] for column, values in repeated.items()}
        for name, path in zip(rows["name"].tolist(), read_paths(contents, rows), strict=True):
            yield LeftOut("duplicate", built.documents.names[name], os.fsdecode(path))


def _place(chunk: Path, folder: Path) -> None:
    try:
        # A second name, so that a kill from here on leaves the shard finished.
        os.link(chunk, folder / chunk.name)
    except OSError:  # a file system without such names
        os.rename(chunk, folder / chunk.name)


def _write_index(folder: Path, results: Sequence[dict[str, Any]], encoded: np.ndarray) -> SplitEntry:
    """Merge the shards of a split to litdata's index.json. litdata's own merge stamps it with the time of day."""
    content = json.dumps(
        {"chunks": [result["litdata_chunk"] for result in results], "config": results[0]["config"]}, sort_keys=True
    )
    atomic_write(folder / INDEX_NAME, content)
    lengths = encoded["tokens"].astype(np.int64)
    return SplitEntry(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        text_bytes=int(encoded["text_bytes"].sum()),
        long_document_share=long_document_share(lengths),
        index_sha256=sha256_bytes(content.encode()),
        chunks=[ChunkEntry(**result["chunk"]) for result in results],
    )


def _card(
    built: Built,
    splits: dict[str, SplitEntry],
    identities: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    tokenizer_name: str,
    inputs: dict[str, Any],
) -> DatasetCard:
    documents, reading = built.documents, built.reading
    used = built.split != DROPPED
    is_written = used[documents.files["document"]]
    files = {column: values[is_written] for column, values in documents.files.items()}
    source_of_file = documents.source[files["document"]]
    sources = []
    of_revision = revisions(reading.packs, len(identities))
    for number, identity in enumerate(identities):
        own = source_of_file == number
        names = {documents.names[name] for name in documents.name[used & (documents.source == number)].tolist()}
        sources.append(
            {
                "identity": identity,
                "units": reading.units[number],
                "documents": int((used & (documents.source == number)).sum()),
                "files": int(own.sum()),
                "bytes": int(files["size"][own].sum()),
                "revisions": {name: text for name, text in of_revision[number].items() if name in names},
                "damaged": {unit: why for source, unit, why in reading.damaged if source == number},
            }
        )
    return DatasetCard(
        splits=splits,
        tokenizer={
            "name": tokenizer_name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": asdict(tokenizer.special_tokens),
            "special_ids": tokenizer.special_ids,
        },
        dtype=np.dtype(tokenizer.dtype).name,
        token_bytes=tokenizer.token_bytes.tolist(),
        sources=sources,
        languages=_by_text(files["language"], files["size"], documents.languages),
        licences=_by_text(files["licence"], files["size"], documents.licences),
        skipped_files={reason: count for reason, count in sorted(reading.skipped.items()) if count},
        dropped_documents=built.dropped,
        files=int(is_written.sum()),
        inputs=inputs,
        fingerprint=content_fingerprint(splits, tokenizer.sha256),
        created_by={
            "muse-lightning": muse_lightning.__version__,
            "litdata": litdata.__version__,
            "python": platform.python_version(),
        },
    )


def _by_text(numbers: np.ndarray, sizes: np.ndarray, texts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Files and bytes of each text that occurs, most bytes first."""
    count = np.bincount(numbers, minlength=len(texts))
    size = np.zeros(len(texts), dtype=np.int64)
    np.add.at(size, numbers, sizes.astype(np.int64))
    order = sorted(np.flatnonzero(count).tolist(), key=lambda number: (-size[number], texts[number]))
    return {texts[number]: {"files": int(count[number]), "bytes": int(size[number])} for number in order}


def _verify(folder: Path, num_workers: int) -> None:
    """Read everything back from the disk and compare it with the card."""
    card = read_card(folder)
    chunks = []
    for name, split in card.splits.items():
        check_index(folder / name, split, card.dtype)
        chunks += [(folder / name / chunk.filename, chunk) for chunk in split.chunks]
    for path, _ in chunks:
        _forget(path)
    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(lambda item: check_written(*item), chunks))


def _forget(path: Path) -> None:
    """Drop a file, which is on the disk, from the kernel's cache, so that the next reader asks the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
