"""How fast a dataset is prepared, beside the tokenizer alone on the same files and cores: `muse bench prepare`."""

import hashlib
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import tokenizers

from muse_lightning.data.building import Preparation
from muse_lightning.data.card import read_card
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
        raise UserError("tokenizer: bytes found, a tokenizer.json expected; `muse tokenizer train` makes one")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= len(cores):
        raise UserError(f"workers: {workers} found, 1 to {len(cores)} expected (cores of this process)")
    # Both are read when the first text is encoded.
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.sched_setaffinity(0, cores[:workers])
    try:
        _bench(sources, tokenizer, workers, repeats, filters)
    finally:
        os.sched_setaffinity(0, cores)


def _bench(sources: list[DocumentSource], tokenizer: str, workers: int, repeats: int, filters: Filters) -> None:
    chosen = load_tokenizer(tokenizer)
    raw = tokenizers.Tokenizer.from_str(chosen.to_json() or "")
    texts = list(_texts(sources, filters))
    size = sum(len(text.encode()) for text in texts)
    batches = list(_batches(texts))
    how = Preparation(filters, Limits(), {}, "shuffle", 0, 64 << 20, workers)
    print(f"{len(texts):,} files, {size / 1e6:,.1f} MB; {workers} core(s) of {platform.machine()}")
    ratios = []
    for _ in range(repeats):
        alone = _Timed(lambda: _encode(raw.encode_batch, batches))
        fast = _Timed(lambda: _encode(raw.encode_batch_fast, batches))
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-prepare-") as folder:
            dataset = Path(folder) / "dataset"
            whole = _Timed(partial(prepare_dataset, dataset, sources, chosen, tokenizer, how))
            card = read_card(dataset)
        if card.files != len(texts):
            raise UserError(f"sources: {card.files} files prepared, {len(texts)} tokenized; did they change meanwhile?")
        ratios.append(alone.seconds / whole.seconds)
        print(f"encode_batch:      {alone.rates(size)}")
        print(f"encode_batch_fast: {fast.rates(size)}")
        print(f"prepare:           {whole.rates(size)}, {card.splits['train'].tokens / 1e6:,.1f}M tokens")
        print(
            f"prepare runs at {alone.seconds / whole.seconds:.0%} of encode_batch, "
            f"{fast.seconds / whole.seconds:.0%} of encode_batch_fast; by processor time "
            f"{alone.cpu_seconds / whole.cpu_seconds:.0%} and {fast.cpu_seconds / whole.cpu_seconds:.0%}"
        )
    print(f"median {median(ratios):.0%} of encode_batch, from {min(ratios):.0%} to {max(ratios):.0%}")


class _Timed:
    """Elapsed time and processor time, of this process and those it waited for, that some work takes."""

    def __init__(self, work: Callable[[], object]) -> None:
        start, cpu_start = time.perf_counter(), _cpu_seconds()
        work()
        self.seconds = time.perf_counter() - start
        self.cpu_seconds = _cpu_seconds() - cpu_start

    def rates(self, size: int) -> str:
        return f"{self.seconds:.2f} s ({size / self.seconds / 1e6:.2f} MB/s), processor time {self.cpu_seconds:.2f} s"


def _cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _encode(encode: Callable[..., object], batches: Sequence[list[str]]) -> None:
    for batch in batches:
        encode(batch, add_special_tokens=False)


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
