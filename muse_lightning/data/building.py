"""The stages of a preparation: read, choose, encode, arrange, write. Each finds what an earlier call has finished."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from muse_lightning.data.choosing import Documents, choose_documents
from muse_lightning.data.documents import DEFAULT_ARCHIVE_LIMITS, ArchiveLimits, ReadLimits, SourceUnit
from muse_lightning.data.encoding import EncodedPart, encode_jobs
from muse_lightning.data.filters import Filters
from muse_lightning.data.inventory import load_inventory
from muse_lightning.data.jobs import Job, run_jobs
from muse_lightning.data.packs import Pack, read_jobs
from muse_lightning.data.progress import StageProgress
from muse_lightning.data.selection import (
    DROPPED,
    SPLITS,
    FileOrder,
    Limits,
    cut_shards,
    is_held_out,
    keep_long_share,
    order_key,
    split_names,
)
from muse_lightning.data.shards import shard_jobs
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.errors import UserError

_PACK_BYTES = 32 << 20
_SMALLEST_PACK_BYTES = 1 << 20
# Of a limit in bytes: reading stops when so much is there, or when so many times the limit was read and anything fits,
# since the last bytes may be found only after many repositories that are too large.
_ENOUGH = 0.95
_MOST_READ = 4
# Enough to keep a disk busy.
_WRITERS = 4


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
    readme_first: bool = False
    deduplicate: bool = True
    skip_damaged: bool = True
    held_out: tuple[str, ...] = ()
    source_weights: tuple[float, ...] | None = None
    archive_limits: ArchiveLimits = field(default=DEFAULT_ARCHIVE_LIMITS)

    def __post_init__(self) -> None:
        weights = self.source_weights
        if weights is not None and (min(weights, default=0) < 0 or sum(weights) <= 0):
            raise UserError(f"data.source_weights: {list(weights)} found, none below 0 and one above 0 expected")


@dataclass(frozen=True)
class Reading:
    """The first stage's result."""

    packs: list[Pack]
    skipped: Counter[str]
    damaged: list[tuple[int, str, str]]
    """Number of the source, name of the unit, what is wrong."""
    units: Counter[int]
    """Units read, by the number of the source."""


@dataclass(frozen=True)
class Built:
    """All that a dataset is made of."""

    reading: Reading
    documents: Documents
    dropped: dict[str, dict[str, int]]
    split: np.ndarray
    """int8 [documents]: index of SPLITS, or DROPPED."""
    encoded: np.ndarray
    """[documents] of ENCODED."""
    shards: dict[str, list[tuple[Path, dict[str, Any]]]]
    """Of each split in the order of SPLITS: folder and result of its shards."""


def build(
    staging: Path,
    units: Sequence[tuple[int, SourceUnit]],
    identities: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    how: Preparation,
) -> Built:
    """Run all stages.

    Args:
        staging: Folder of what is finished; kept when this call fails, for the next one.
        units: All units, each with the number of its source, in the order of the sources.
        identities: Of the sources.
        tokenizer: Text to ids.
        how: Filters, limits, splits, order, seed.
    Raises:
        UserError: nothing is left after the filters, a split would be empty, a process was killed.
        OSError: the disk is full.
    """
    reading = _read(staging / "packs", units, identities, how)
    documents = choose_documents(
        load_inventory(reading.packs),
        how.limits,
        weights=how.source_weights,
        held_out=how.held_out,
        deduplicate=how.deduplicate,
        seed=how.seed,
    )
    reading.skipped.update(documents.skipped)
    if not len(documents):
        raise _nothing_left(staging, reading)
    for pattern in how.held_out:
        if not is_held_out(documents.names, [pattern]).any():
            print(f"data: data.held_out: {pattern!r} matches no repository that was read", file=sys.stderr, flush=True)
    # Only tokens decide what is long enough, but too few repositories for the splits can be told before hours of work.
    _split(documents, np.ones(len(documents), dtype=bool), how)
    parts, encoded = _encode(staging / "ids", documents, reading.packs, tokenizer, how)
    split, dropped = arrange(documents, encoded["tokens"].astype(np.int64), how)
    shards = _write(staging / "shards", documents, parts, encoded, split, tokenizer, how)
    return Built(reading, documents, {**documents.dropped, **dropped}, split, encoded, shards)


def _nothing_left(staging: Path, reading: Reading) -> UserError:
    """The error to raise where there are no documents. What was read is kept where other limits may admit it."""
    listed = sum(len(pack.repositories()) for pack in reading.packs)
    if not any(len(pack.files()) for pack in reading.packs):
        shutil.rmtree(staging)
    if not listed:
        found = f"{reading.units.total()} listed units"
        for _, unit, why in reading.damaged[:1]:
            found += f", {len(reading.damaged)} of them damaged; the first: {_damage(unit, why)}"
        return UserError(f"no repository was found in {found}; repair them or give other sources")
    return UserError(
        f"nothing is left of {listed} listed repositories after the filters and limits"
        f"{skipped_text(reading.skipped)}; loosen data.filters or the limits, or give other sources"
    )


def _read(
    root: Path, units: Sequence[tuple[int, SourceUnit]], identities: Sequence[dict[str, Any]], how: Preparation
) -> Reading:
    limits = ReadLimits(**vars(how.archive_limits), max_file_bytes=how.filters.max_file_bytes)
    packs: list[Pack] = []
    skipped: Counter[str] = Counter()
    damaged: list[tuple[int, str, str]] = []
    read: Counter[int] = Counter()
    streams = list(_streams(units, how))
    finished = 0
    for number, (stream, max_bytes, max_documents) in enumerate(streams):
        enough = _Enough(max_bytes, max_documents)
        pack_bytes = _PACK_BYTES
        if max_bytes is not None or max_documents is not None:
            pack_bytes = max(_SMALLEST_PACK_BYTES, min(_PACK_BYTES, (max_bytes or 0) // 8))
        jobs = list(read_jobs(stream, identities, how.filters, limits, pack_bytes))
        total = sum(job.size for job in jobs)
        with StageProgress("reading", total if max_bytes is None else min(total, max_bytes)) as progress:
            # One folder per stream: a stage removes what belongs to none of its jobs.
            running = run_jobs(root / str(number), jobs, progress, num_workers=how.num_workers)
            with closing(running):
                for (folder, result), job in zip(running, jobs, strict=False):
                    packs.append(Pack(folder, result["languages"], result["licences"]))
                    skipped.update(result["skipped"])
                    read.update(source for source, _ in job.units)
                    for source, unit, why in result["damaged"]:
                        _report_damage(unit, why, how)
                        damaged.append((source, unit, why))
                    if enough.after(packs[-1].repositories()):
                        break
            finished += progress.finished_before
    _report_finished("packs", finished, len(packs))
    return Reading(packs, skipped, damaged, read)


def _streams(
    units: Sequence[tuple[int, SourceUnit]], how: Preparation
) -> Iterator[tuple[list[tuple[int, SourceUnit]], int | None, int | None]]:
    """Sequences of units that are read until there is enough: units, bytes wanted, documents wanted.

    Where not all is wanted, units are drawn in seeded order, that of documents where units are named as these: a prefix
    of it is read, whatever the number of processes.
    """
    limits, weights = how.limits, how.source_weights
    wanted = [(source, unit) for source, unit in units if weights is None or weights[source] > 0]
    seeded = sorted(wanted, key=lambda item: (order_key(how.seed, item[1].name, ""), item[0]))
    if weights is not None and limits.max_bytes is not None:
        for number, weight in enumerate(weights):
            if weight > 0:
                own = [item for item in seeded if item[0] == number]
                yield own, int(limits.max_bytes * weight / sum(weights)), None
    elif weights is None and (limits.max_bytes is not None or limits.max_documents is not None):
        yield seeded, limits.max_bytes, limits.max_documents
    else:
        yield wanted, None, None


class _Enough:
    """Whether what was read so far fills the limits."""

    def __init__(self, max_bytes: int | None, max_documents: int | None) -> None:
        self._max_bytes, self._max_documents = max_bytes, max_documents
        self._taken = self._read = 0
        self._names: set[tuple[int, bytes]] = set()

    def after(self, repositories: np.ndarray) -> bool:
        """Count one more pack's repositories, each that still fits."""
        for row in repositories[repositories["size"] > 0]:
            self._read += int(row["size"])
            if self._max_bytes is None or self._taken + int(row["size"]) <= self._max_bytes:
                self._taken += int(row["size"])
                if self._max_documents is not None:
                    self._names.add((int(row["source"]), row["name_digest"].tobytes()))
        if self._max_documents is not None and len(self._names) >= self._max_documents:
            return True
        return self._max_bytes is not None and (
            self._taken >= _ENOUGH * self._max_bytes or (self._taken > 0 and self._read >= _MOST_READ * self._max_bytes)
        )


def _report_damage(unit: str, why: str, how: Preparation) -> None:
    if not how.skip_damaged:
        raise UserError(f"{_damage(unit, why)}; repair or remove it, or set data.skip_damaged to true")
    print(f"data: left out, damaged: {_damage(unit, why)}", file=sys.stderr, flush=True)


def _damage(unit: str, why: str) -> str:
    """A damaged unit in a message. `why` does not name it."""
    return f"{os.fsencode(unit).decode('utf-8', 'replace')}: {why}"


def _report_finished(what: str, finished: int, total: int) -> None:
    if finished:
        print(f"data: {finished} of {total} {what} were finished before", file=sys.stderr, flush=True)


def _encode(
    root: Path, documents: Documents, packs: Sequence[Pack], tokenizer: Tokenizer, how: Preparation
) -> tuple[list[EncodedPart], np.ndarray]:
    jobs: Iterator[Job] = encode_jobs(
        documents,
        packs,
        tokenizer,
        file_order=how.file_order,
        readme_first=how.readme_first,
        seed=how.seed,
    )
    with StageProgress("encoding", int(documents.sizes.sum())) as progress:
        parts = [
            EncodedPart(folder)
            for folder, _ in run_jobs(root, jobs, progress, num_workers=how.num_workers, context=tokenizer)
        ]
        print(f"data: {progress.rates(is_done=True)}", file=sys.stderr, flush=True)
    _report_finished("parts of ids", progress.finished_before, len(parts))
    return parts, np.concatenate([part.documents() for part in parts])


def arrange(documents: Documents, tokens: np.ndarray, how: Preparation) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """The split of every document, as index of SPLITS or DROPPED, and what is dropped for its length.

    Raises:
        UserError: a split would be empty.
    """
    is_kept = tokens >= how.limits.min_document_tokens
    dropped = _counted(documents, "min_document_tokens", ~is_kept)
    if not is_kept.any():
        raise UserError(
            f"data.min_document_tokens: {how.limits.min_document_tokens} found, but the longest document has "
            f"{int(tokens.max())} tokens; lower it"
        )
    split = _split(documents, is_kept, how)
    if how.limits.long_document_share is not None:
        train = np.flatnonzero(split == SPLITS.index("train"))
        short = train[~keep_long_share(tokens[train], how.limits.long_document_tokens, how.limits.long_document_share)]
        split[short] = DROPPED
        gone = np.zeros(len(split), dtype=bool)
        gone[short] = True
        dropped.update(_counted(documents, "long_document_share", gone))
    return split, dropped


def _split(documents: Documents, is_kept: np.ndarray, how: Preparation) -> np.ndarray:
    sizes = np.zeros(len(documents.names), dtype=np.int64)
    np.add.at(sizes, documents.name[is_kept], documents.sizes[is_kept])
    by_name = split_names(documents.names, sizes, documents.held_out, how.fractions, how.seed)
    return np.where(is_kept, by_name[documents.name], DROPPED).astype(np.int8)


def _counted(documents: Documents, reason: str, gone: np.ndarray) -> dict[str, dict[str, int]]:
    counts = {"documents": int(gone.sum()), "bytes": int(documents.sizes[gone].sum())}
    return {reason: counts} if counts["documents"] else {}


def _write(
    root: Path,
    documents: Documents,
    parts: Sequence[EncodedPart],
    encoded: np.ndarray,
    split: np.ndarray,
    tokenizer: Tokenizer,
    how: Preparation,
) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
    part = np.repeat(np.arange(len(parts)), [len(one.documents()) for one in parts])
    tokens = encoded["tokens"].astype(np.int64)
    written: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    finished = 0
    for index, name in enumerate(SPLITS):
        rows = np.flatnonzero(split == index)
        if not len(rows):
            continue
        shard = cut_shards(documents.sizes[rows], how.chunk_bytes)
        members = np.split(rows, np.flatnonzero(np.diff(shard)) + 1)
        jobs = shard_jobs(parts, tokens, part, members, np.dtype(tokenizer.dtype).name)
        with StageProgress("writing", int(tokens[rows].sum())) as progress:
            # Threads: nearly all of it is copying and hashing, which needs no process of its own. Few, as each holds a
            # chunk.
            threads = min(how.num_workers, _WRITERS)
            written[name] = list(run_jobs(root / name, jobs, progress, num_workers=threads, in_threads=True))
        finished += progress.finished_before
    _report_finished("shards", finished, sum(map(len, written.values())))
    return written


def skipped_text(skipped: Counter[str]) -> str:
    """The files left out, by reason, as the end of a line."""
    if not skipped.total():
        return ""
    found = [(reason, count) for reason, count in skipped.most_common() if count]
    return "; files left out: " + ", ".join(f"{reason} {count:,}" for reason, count in found)
