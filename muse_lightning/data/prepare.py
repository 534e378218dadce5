"""Sources to a prepared dataset: choose, split, write shards, describe. Built once, used again while its inputs are
the same."""

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import litdata
import numpy as np

import muse_lightning
from muse_lightning.data.card import (
    CARD_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    TOKENIZER_NAME,
    DatasetCard,
    SplitEntry,
    content_fingerprint,
    long_document_share,
    read_card,
)
from muse_lightning.data.documents import Document, DocumentSource, listing_digest
from muse_lightning.data.filters import Filters
from muse_lightning.data.progress import PreparationProgress
from muse_lightning.data.selection import FileOrder, Limits, choose_documents, cut_shards, split_documents
from muse_lightning.data.shards import ShardJob, ShardResult, write_shard
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_directory, atomic_write, exclusive_lock, sha256_bytes


@dataclass(frozen=True)
class Preparation:
    """How a dataset is made. Everything here but `num_workers` decides its content."""

    filters: Filters
    limits: Limits
    fractions: dict[str, float]
    file_order: FileOrder
    seed: int
    chunk_bytes: int
    num_workers: int


def prepare_dataset(
    dataset: Path, sources: Sequence[DocumentSource], tokenizer: Tokenizer, tokenizer_name: str, how: Preparation
) -> DatasetCard:
    """Make the dataset, or use the one that is there when nothing that decides its content has changed.

    The sources are listed at every call: name, size, and times of modification and of status change of every file are
    compared (as git's index does), contents are not read. A changed dataset is built anew, beside the old one, and
    then replaces it.

    Args:
        dataset: The folder of the dataset.
        sources: Where documents come from, in the order that breaks ties between equal names.
        tokenizer: Text to ids.
        tokenizer_name: As configured; noted in the card.
        how: Filters, limits, splits, order, seed.
    Raises:
        UserError: a source is missing or empty, nothing is left after the filters, a split would be empty, or the
            folder exists and is not a dataset.
    """
    listed = [document for source in sources for document in source.documents()]
    inputs = {
        "sources": [source.identity() for source in sources],
        "files": listing_digest(listed),
        "tokenizer": tokenizer.sha256,
        "filters": asdict(how.filters),
        "limits": asdict(how.limits),
        "fractions": how.fractions,
        "file_order": how.file_order,
        "seed": how.seed,
        "chunk_bytes": how.chunk_bytes,
        "format_version": FORMAT_VERSION,
    }
    if not _reasons_to_build(dataset, inputs):
        return read_card(dataset)
    with exclusive_lock(dataset):
        # Another process may have built it while this one waited for the lock.
        reasons = _reasons_to_build(dataset, inputs)
        if reasons:
            if dataset.exists():
                print(f"data: {dataset} is prepared again: {'; '.join(reasons)}", file=sys.stderr, flush=True)
            with atomic_directory(dataset) as folder:
                _build(folder, listed, tokenizer, tokenizer_name, how, inputs)
    return read_card(dataset)


def damaged_chunks(dataset: Path, card: DatasetCard) -> list[str]:
    """Chunk files that are missing or have another length than the card says; contents are not read."""
    damaged = []
    for name, split in card.splits.items():
        for chunk in split.chunks:
            path = dataset / name / chunk.filename
            if not path.is_file():
                damaged.append(f"{path} is missing")
            elif path.stat().st_size != chunk.size_bytes:
                damaged.append(f"{path} has {path.stat().st_size} bytes instead of {chunk.size_bytes}")
    return damaged


def _reasons_to_build(dataset: Path, inputs: dict[str, Any]) -> list[str]:
    """Why the dataset has to be built; empty when it can be used as it is."""
    if not dataset.exists():
        return ["it does not exist"]
    card_path = dataset / CARD_NAME
    if not card_path.exists():
        if dataset.is_dir() and not any(dataset.iterdir()):
            return ["it is empty"]
        raise UserError(f"data.dataset: {dataset} exists and is not a prepared dataset; give a new folder")
    try:
        old = json.loads(card_path.read_text())["inputs"]
        old_inputs = {key: old.get(key) for key in inputs}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return [f"its {CARD_NAME} is unreadable"]
    # Compared as JSON, so that a tuple and a list, or 0 and 0.0, are no difference.
    changed = [key for key, value in inputs.items() if old_inputs[key] != json.loads(json.dumps(value))]
    if changed:
        return [_describe_change(key, old_inputs[key], inputs[key]) for key in changed]
    return damaged_chunks(dataset, read_card(dataset))


def _describe_change(key: str, old: Any, new: Any) -> str:
    if key in ("files", "tokenizer"):  # digests
        return f"{key} changed"
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [f"{key}.{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)]
        return ", ".join(parts) or f"{key} changed"
    return f"{key} changed" if isinstance(new, list) else f"{key} {old} -> {new}"


def _build(
    folder: Path,
    listed: Sequence[Document],
    tokenizer: Tokenizer,
    tokenizer_name: str,
    how: Preparation,
    inputs: dict[str, Any],
) -> None:
    """Write all of a dataset into an empty folder."""
    chosen = choose_documents(listed, how.limits, how.filters, how.seed)
    if not any(document.files for document in chosen):
        skipped: Counter[str] = Counter()
        for document in choose_documents(listed, Limits(), how.filters, how.seed):
            skipped.update(document.skipped)
        raise UserError(_nothing_left(len(listed), skipped))
    with_files = [document for document in chosen if document.files]
    without_files = [document for document in chosen if not document.files]
    jobs = [
        ShardJob(folder / split, index, shard, how.filters, how.file_order, how.seed)
        for split, documents in split_documents(with_files, how.fractions, how.seed).items()
        for index, shard in enumerate(cut_shards(documents, how.chunk_bytes))
    ]
    for job in jobs:
        job.folder.mkdir(exist_ok=True)
    with PreparationProgress(sum(document.size for document in with_files)) as progress:
        results = list(zip(jobs, _write_shards(jobs, tokenizer, how.num_workers, progress), strict=True))
    total_skipped: Counter[str] = Counter()
    for document in without_files:
        total_skipped.update(document.skipped)
    for _, result in results:
        total_skipped.update(result.skipped)
    splits: dict[str, SplitEntry] = {}
    for split in dict.fromkeys(job.folder.name for job in jobs):
        written = [result for job, result in results if job.folder.name == split and result.chunk is not None]
        if not written and split == "train":
            raise UserError(_nothing_left(len(listed), total_skipped))
        if not written:
            raise UserError(
                f"split {split!r}: no file is left after the filters; "
                f"give more repositories, or set data.{split}_fraction to 0"
            )
        splits[split] = _write_index(folder / split, written)
    tokenizer_json = tokenizer.to_json()
    if tokenizer_json is not None:
        atomic_write(folder / TOKENIZER_NAME, tokenizer_json)
    card = DatasetCard(
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
        skipped_files=dict(sorted(total_skipped.items())),
        files=sum(result.files for _, result in results),
        inputs=inputs,
        fingerprint=content_fingerprint(splits, tokenizer.sha256),
        created_by={
            "muse-lightning": muse_lightning.__version__,
            "litdata": litdata.__version__,
            "python": platform.python_version(),
        },
    )
    atomic_write(folder / CARD_NAME, card.to_json())
    counts = ", ".join(f"{name} {split.documents:,}" for name, split in splits.items())
    print(f"data: documents: {counts}; {progress.rates()}{_skipped_text(total_skipped)}", file=sys.stderr, flush=True)


def _write_index(folder: Path, results: Sequence[ShardResult]) -> SplitEntry:
    """Merge the shards of a split to litdata's index.json. litdata's own merge stamps it with the time of day."""
    config = results[0].config
    content = json.dumps({"chunks": [result.litdata_chunk for result in results], "config": config}, sort_keys=True)
    atomic_write(folder / INDEX_NAME, content)
    lengths = np.array([tokens for result in results for tokens in result.document_tokens], dtype=np.int64)
    return SplitEntry(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        text_bytes=sum(result.text_bytes for result in results),
        long_document_share=long_document_share(lengths),
        index_sha256=sha256_bytes(content.encode()),
        chunks=[result.chunk for result in results if result.chunk is not None],
    )


def _write_shards(
    jobs: Sequence[ShardJob], tokenizer: Tokenizer, num_workers: int, progress: PreparationProgress
) -> Iterator[ShardResult]:
    """Results in the order of the jobs, from this process or from `num_workers` others."""
    if num_workers <= 1 or len(jobs) == 1:
        for job in jobs:
            yield write_shard(
                job,
                tokenizer,
                lambda document, files, tokens: progress.advance(
                    listed_bytes=document.size, files=files, tokens=tokens
                ),
            )
        return
    # spawn: a fork would copy the threads' locks of torch and of the tokenizer.
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tokenizer,)
    ) as pool:
        futures = [pool.submit(_write_shard_in_worker, job) for job in jobs]
        try:
            for job, future in zip(jobs, futures, strict=True):
                result = future.result()
                progress.advance(
                    listed_bytes=sum(document.size for document in job.documents),
                    files=result.files,
                    tokens=sum(result.document_tokens),
                )
                yield result
        except BrokenProcessPool as error:
            raise UserError(
                "a preparation process was killed, most likely for lack of memory; "
                "use fewer data.prepare_workers or smaller data.chunk_bytes"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    # One thread per process: there are as many processes as the user wants busy cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _write_shard_in_worker(job: ShardJob) -> ShardResult:
    return write_shard(job, _worker_tokenizer)


def _nothing_left(repositories: int, skipped: Counter[str]) -> str:
    return (
        f"nothing is left of {repositories} listed repositories after the filters and limits{_skipped_text(skipped)}; "
        "loosen data.filters or the limits, or give other sources"
    )


def _skipped_text(skipped: Counter[str]) -> str:
    if not skipped.total():
        return ""
    return "; files left out: " + ", ".join(f"{reason} {count:,}" for reason, count in skipped.most_common())
