"""How fast a dataset is prepared, beside the tokenizer alone on the same files and cores: `muse bench prepare`."""

import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import tokenizers

from muse_lightning.data.building import Preparation
from muse_lightning.data.documents import DamagedSource, DocumentSource, ReadLimits
from muse_lightning.data.filters import DEFAULT_FILTERS, Filters
from muse_lightning.data.prepare import prepare_dataset
from muse_lightning.data.selection import Limits
from muse_lightning.data.tokenizer import load_tokenizer
from muse_lightning.errors import UserError

# Texts given to the tokenizer at once: more than enough for every core.
_BATCH_BYTES = 4 << 20


def bench_prepare(
    sources: list[DocumentSource],
    tokenizer: str,
    workers: int = 1,
    repeats: int = 3,
    filters: Filters = DEFAULT_FILTERS,
) -> None:
    """Time a whole preparation (listing, reading, filtering, tokenizing, writing, verifying), and the tokenizer's
    encode_batch alone on the files that are left, held in memory. Both on the same cores, in turn.

    Args:
        sources: What to prepare, as in a recipe's data.sources. All of it is used, and held in memory.
        tokenizer: Path of a tokenizer.json.
        workers: Cores to use; the preparation has as many processes, encode_batch as many threads.
        repeats: How often each is timed.
        filters: Which files are left out.
    """
    if tokenizer == "bytes":
        raise UserError(
            "tokenizer: bytes found, the path of a tokenizer.json expected; `muse tokenizer train` makes one"
        )
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= len(cores):
        raise UserError(f"workers: {workers} found, 1 to {len(cores)} expected (cores of this process)")
    os.sched_setaffinity(0, cores[:workers])
    # Both are read when the first text is encoded.
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    chosen = load_tokenizer(tokenizer)
    raw = tokenizers.Tokenizer.from_str(chosen.to_json() or "")
    texts = list(_texts(sources, filters))
    size = sum(len(text.encode()) for text in texts)
    batches = list(_batches(texts))
    how = Preparation(filters, Limits(), {}, "shuffle", 0, 64 << 20, workers)
    print(
        f"{len(texts):,} files, {size / 1e6:,.1f} MB; {workers} core(s), {platform.processor() or platform.machine()}"
    )
    ratios = []
    for _ in range(repeats):
        alone = _seconds_of(raw, batches, is_fast=False)
        fast = _seconds_of(raw, batches, is_fast=True)
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-prepare-") as folder:
            start = time.perf_counter()
            card = prepare_dataset(Path(folder) / "dataset", sources, chosen, tokenizer, how)
            whole = time.perf_counter() - start
        if card.files != len(texts):
            raise UserError(f"sources: {card.files} files prepared, {len(texts)} tokenized; did they change meanwhile?")
        tokens = card.splits["train"].tokens
        ratios.append(alone / whole)
        print(
            f"encode_batch {alone:.2f} s ({size / alone / 1e6:.2f} MB/s), encode_batch_fast {fast:.2f} s "
            f"({size / fast / 1e6:.2f} MB/s), prepare {whole:.2f} s ({size / whole / 1e6:.2f} MB/s, "
            f"{tokens / whole / 1e6:.2f}M tokens/s): {alone / whole:.0%} of encode_batch, {fast / whole:.0%} of "
            "encode_batch_fast"
        )
    print(f"median {median(ratios):.0%} of encode_batch, from {min(ratios):.0%} to {max(ratios):.0%}")


def _texts(sources: Sequence[DocumentSource], filters: Filters) -> Iterator[str]:
    """Every file that a preparation would keep, once."""
    seen = set()
    for source in sources:
        for unit in source.units():
            try:
                for repository in unit.read(ReadLimits(max_file_bytes=filters.max_file_bytes)):
                    for file in repository.files:
                        digest = hashlib.blake2b(file.content, digest_size=16).digest()
                        if file.for_licence or digest in seen or filters.check(file.path, file.content).reason:
                            continue
                        seen.add(digest)
                        yield file.content.decode()
            except DamagedSource:
                continue


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _seconds_of(tokenizer: tokenizers.Tokenizer, batches: Sequence[list[str]], is_fast: bool) -> float:
    encode = tokenizer.encode_batch_fast if is_fast else tokenizer.encode_batch
    start = time.perf_counter()
    for batch in batches:
        encode(batch, add_special_tokens=False)
    return time.perf_counter() - start
