"""`muse bench data`: tokens per second of the loader alone."""

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from muse_lightning.data.batches import Collate
from muse_lightning.data.block_reader import BlockReader, LocalChunks, SplitFiles
from muse_lightning.data.card import ChunkEntry, SplitEntry
from muse_lightning.data.mixing import Part, Plan
from muse_lightning.data.prepared import PreparedDataset
from muse_lightning.data.remote import ChunkCache
from muse_lightning.data.streaming import Share, TrainLoader
from muse_lightning.errors import UserError
from muse_lightning.files import sha256_file

_DOCUMENT_TOKENS = 8192
_MADE_CHUNKS = 4


@dataclass(frozen=True)
class Rate:
    """One measurement."""

    num_workers: int
    batch_size: int
    seq_len: int
    batches: int
    first_batch_s: float
    """From asking for the first batch to having it: workers start, the first chunks are hashed."""
    tokens_per_sec: float
    """Of the batches after the first."""


def bench_data(
    dataset: Path | None = None,
    seq_len: int = 65_536,
    batch_size: int = 1,
    workers: tuple[int, ...] = (0, 1, 2, 4),
    seconds: float = 5.0,
    document_mask: bool = True,
    target: float = 5_000_000,
    out: Path | None = None,
) -> None:
    """Time the training loader without a model: read, check, cut, collate, hash for the ledger, hand over.

    Prints a line for each number of workers, and at the end whether the fastest reaches the target.

    Args:
        dataset: A prepared dataset. null: 256 MiB of random tokens are written to a temporary folder.
        seq_len: Context in tokens.
        batch_size: Blocks in a batch.
        workers: Numbers of processes to try; 0 reads in this one.
        seconds: About how long each is timed.
        document_mask: Whether batches have cu_seqlens.
        target: Tokens per second that are wanted: 20 times what a fast GPU recipe takes.
        out: File to write the measurements to, one JSON object per line.
    """
    with tempfile.TemporaryDirectory(prefix="muse-bench-") as made:
        files, part = _open(dataset, seq_len) if dataset is not None else _make(Path(made), seq_len)
        if sum(part.counts) < batch_size:
            raise UserError(f"seq_len: {seq_len} found; the dataset has {sum(part.counts)} blocks of that length")
        rates = []
        for count in workers:
            plan = Plan([part], seed=0, global_batch=batch_size)
            reader = BlockReader([files], seq_len)
            collate = Collate(document_mask, with_record=True)
            loader = TrainLoader(reader, collate, count, plan=plan, batch_size=batch_size, share=Share())
            rates.append(measure(loader, count, batch_size, seq_len, seconds))
            rate = rates[-1]
            print(
                f"{count} workers: {rate.tokens_per_sec / 1e6:.1f}M tokens/s, "
                f"first batch after {rate.first_batch_s:.2f} s",
                flush=True,
            )
    best = max(rates, key=lambda rate: rate.tokens_per_sec)
    verdict = "reached" if best.tokens_per_sec >= target else "missed"
    print(f"target {target / 1e6:g}M tokens/s: {verdict}, {best.tokens_per_sec / target:.1f} times that")
    if out is not None:
        out.write_text("".join(json.dumps(asdict(rate)) + "\n" for rate in rates))


def measure(loader: TrainLoader, num_workers: int, batch_size: int, seq_len: int, seconds: float) -> Rate:
    """Time one loader, over as many epochs as it takes."""
    started = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter() - started
    batches, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        # Some at once, so that the clock costs nothing; at the end of an epoch none is left.
        read = sum(1 for _ in islice(iterator, 8))
        batches += read
        if not read:
            iterator = iter(loader)
    elapsed = time.perf_counter() - begin
    return Rate(num_workers, batch_size, seq_len, batches, first, batches * batch_size * seq_len / elapsed)


def _open(dataset: Path, seq_len: int) -> tuple[SplitFiles, Part]:
    opened = PreparedDataset.open(str(dataset), "dataset", 1.0, ChunkCache(dataset, 0))
    opened.check(["train"])
    return opened.split("train"), opened.part(seq_len)


def _make(folder: Path, seq_len: int) -> tuple[SplitFiles, Part]:
    """Chunks of 64 MiB: random uint16 tokens in documents of 8,192."""
    chunks = []
    count = 2**25 // _DOCUMENT_TOKENS
    for number in range(_MADE_CHUNKS):
        path = folder / f"chunk-0-{number}.bin"
        tokens = np.random.default_rng(number).integers(0, 2**15, count * _DOCUMENT_TOKENS, dtype=np.uint16)
        offsets = 4 * (count + 2) + 2 * _DOCUMENT_TOKENS * np.arange(count + 1)
        with path.open("wb") as file:
            np.concatenate([[count], offsets]).astype(np.uint32).tofile(file)
            tokens.tofile(file)
        chunks.append(ChunkEntry(path.name, sha256_file(path), path.stat().st_size, len(tokens), count))
    total = sum(chunk.tokens for chunk in chunks)
    entry = SplitEntry(count * _MADE_CHUNKS, total, total, {}, "", chunks)
    files = SplitFiles(entry, "uint16", LocalChunks(folder))
    return files, Part("random", "random", files.counts(seq_len))
