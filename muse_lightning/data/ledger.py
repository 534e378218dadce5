"""The ledger of a run: which blocks each rank trained on, a line for a batch. `callbacks/ledger.py` writes it,
`muse data audit` reads it.

A file `ledger/rank<R>.jsonl` has two kinds of lines:

    {"datasets": [{"name": "code", "fingerprint": "9f...", "weight": 0.8, "blocks": [412, 398]}, ...],
     "rank": 0, "world_size": 2, "ranks_per_block": 1, "batch_size": 4, "seq_len": 65536, "batch": 0}
    {"step": 1, "batch": 0, "hash": "6b...", "blocks": [[0, 1, 17, 203], ...]}

The first describes the batches after it; there is one at the start and one at each resume. The second is a batch:
optimizer step it belongs to (from 1), number since the start of the run (from 0), hash, and for each block the number
of its dataset, the epoch of that dataset (from 1), its chunk and the block in that.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from muse_lightning.data.block_reader import Block
from muse_lightning.errors import UserError, reason_of

FOLDER_NAME = "ledger"
# Of any number in a ledger; and of the blocks that a header may list: of one token each they fill a terabyte.
_MOST = 1 << 63
_MOST_BLOCKS = 1 << 40
_FILE_NAME = re.compile(r"rank(\d+)\.jsonl")


@dataclass(frozen=True)
class LedgerDataset:
    """A dataset that batches are read from."""

    name: str
    fingerprint: str
    weight: float
    blocks: list[int]
    """Blocks of each chunk of its train split, at this context."""


@dataclass(frozen=True)
class LedgerHeader:
    """What holds for the batches after it."""

    datasets: list[LedgerDataset]
    rank: int
    world_size: int
    ranks_per_block: int
    batch_size: int
    seq_len: int
    batch: int
    """Number of the first batch after it."""

    def to_line(self) -> str:
        """Its line in the file."""
        return json.dumps(asdict(self), separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class LedgerBatch:
    """One batch of one rank."""

    step: int
    batch: int
    hash: str
    blocks: list[list[int]]


def batch_record(blocks: Sequence[Block]) -> str:
    """The part of a batch's line that is known where the batch is made: hash and ids.

    The hash is BLAKE2b over the tokens as little-endian int32 and the document starts as int64, block after block:
    equal hashes, equal batches, whatever type the tokens are stored in.
    """
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        digest.update(block.tokens.numpy().astype("<i4").data)
        digest.update(block.starts.numpy().astype("<i8").data)
    ids = [list(block.id) for block in blocks if block.id is not None]
    return f'"hash":"{digest.hexdigest()}","blocks":{json.dumps(ids, separators=(",", ":"))}'


def chained_hash(before: str, record: str) -> str:
    """Hash of all batches up to one, from that of those before it ("" of none) and its record: equal only if every
    token of every batch was."""
    digest = json.loads(f"{{{record}}}")["hash"]
    return hashlib.blake2b(f"{before}{digest}".encode(), digest_size=16).hexdigest()


def chained_hash_of(lines: Iterable[str]) -> str:
    """The chained hash of the batches in lines of a ledger."""
    chained = ""
    for line in lines:
        if '"hash":' in line:
            chained = chained_hash(chained, line[line.index('"hash":') :].rstrip()[:-1])
    return chained


def batch_line(step: int, batch: int, record: str) -> str:
    """A batch's line in the file."""
    return f'{{"step":{step},"batch":{batch},{record}}}\n'


def ledger_files(folder: Path) -> dict[int, Path]:
    """Files by rank; none where there is no ledger."""
    found = ((_FILE_NAME.fullmatch(path.name), path) for path in folder.glob("rank*.jsonl"))
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1].name) if match}


def ledger_path(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank{rank}.jsonl"


def kept_lines(path: Path, batches: int) -> Iterator[str]:
    """The lines of a ledger that a run keeps which goes on after its first `batches` batches.

    Raises:
        UserError: a line before that is damaged.
    """
    for line, entry in _entries(path):
        if entry["batch"] >= batches:
            return
        yield line


def read_ledger(path: Path) -> Iterator[LedgerHeader | LedgerBatch]:
    """The entries of a ledger, in order.

    Raises:
        UserError: a line is damaged. The last one may be cut short by a kill: it is left out.
    """
    header: LedgerHeader | None = None
    for number, (_, fields) in enumerate(_entries(path), start=1):
        entry: LedgerHeader | LedgerBatch | None = None
        # Raised where a line has other fields than these.
        with suppress(TypeError):
            if "datasets" in fields:
                datasets = [LedgerDataset(**dataset) for dataset in fields["datasets"]]
                entry = header = LedgerHeader(**{**fields, "datasets": datasets})
            else:
                entry = LedgerBatch(**fields)
        if entry is None or not (_is_header(entry) if isinstance(entry, LedgerHeader) else _is_batch(entry, header)):
            raise _damaged(path, number)
        yield entry


def is_cut_short(path: Path) -> bool:
    """Whether the last line of a ledger was cut short by a kill.

    Raises:
        UserError: it cannot be read.
    """
    with _reading(path), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        return file.read() not in (b"", b"\n")


def _is_header(header: LedgerHeader) -> bool:
    sizes = (header.world_size, header.ranks_per_block, header.batch_size, header.seq_len)
    return (
        all(_is_count(value) for value in (header.rank, header.batch, *sizes))
        and all(sizes)
        and all(isinstance(dataset.name, str) and isinstance(dataset.fingerprint, str) for dataset in header.datasets)
        and all(isinstance(dataset.blocks, list) for dataset in header.datasets)
        and all(_is_count(blocks) for dataset in header.datasets for blocks in dataset.blocks)
        and sum(blocks for dataset in header.datasets for blocks in dataset.blocks) < _MOST_BLOCKS
        and all(type(dataset.weight) in (int, float) for dataset in header.datasets)
        and all(0 <= dataset.weight < math.inf for dataset in header.datasets)
    )


def _is_batch(batch: LedgerBatch, header: LedgerHeader | None) -> bool:
    """Whether a batch is well formed and read blocks that the header before it, if there is one, knows."""
    if not (_is_count(batch.step) and isinstance(batch.hash, str) and isinstance(batch.blocks, list)):
        return False
    for block in batch.blocks:
        if not isinstance(block, list) or len(block) != 4 or not all(_is_count(number) for number in block):
            return False
        if header is not None:
            dataset, _, chunk, number = block
            blocks = header.datasets[dataset].blocks if dataset < len(header.datasets) else []
            if chunk >= len(blocks) or number >= blocks[chunk]:
                return False
    return True


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _damaged(path: Path, number: int) -> UserError:
    return UserError(f"{path}:{number} is damaged: not a line of a ledger; only the last line may be cut short")


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _reading(path), path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            # The process was killed in the middle of it.
            if not line.endswith("\n"):
                return
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _damaged(path, number) from error
            if not isinstance(fields, dict) or not _is_count(fields.get("batch")):
                raise _damaged(path, number)
            yield line, fields


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from error
