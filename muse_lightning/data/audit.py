"""`muse data audit RUN`: what a run's ledger says of the tokens that were seen: which share, how often, by whom."""

import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from muse_lightning.data.ledger import (
    FOLDER_NAME,
    LedgerBatch,
    LedgerDataset,
    LedgerHeader,
    is_cut_short,
    ledger_files,
    read_ledger,
)
from muse_lightning.errors import ExitCode, UserError
from muse_lightning.files import expand_home


@dataclass
class EpochCount:
    """How often each block of one epoch of one dataset was read.

    Attributes:
        total: Blocks of the dataset.
    """

    dataset: LedgerDataset
    epoch: int
    seq_len: int
    dropped: int = 0
    """Most blocks that the end of the epoch may leave out: less than a global batch."""

    def __post_init__(self) -> None:
        *self._begins, self.total = accumulate(self.dataset.blocks, initial=0)
        # Number of the block of each reading, in stored order: the header only says how many blocks there are.
        self._read = array("q")

    def add(self, chunk: int, block: int) -> None:
        """Count one reading."""
        self._read.append(self._begins[chunk] + block)

    @property
    def seen(self) -> int:
        """Blocks read at least once."""
        return len(np.unique(np.array(self._read)))

    @property
    def repeats(self) -> int:
        """Readings of blocks that had been read in this epoch."""
        return len(self._read) - self.seen


@dataclass
class RankCount:
    """What one rank's file says."""

    batches: int = 0
    tokens: int = 0
    first_step: int = 0
    last_step: int = 0
    by_dataset: Counter[str] = field(default_factory=Counter)
    """Tokens of each dataset."""
    by_world_size: Counter[int] = field(default_factory=Counter)
    """Batches by the number of ranks there were."""


@dataclass
class Audit:
    """The findings of an audit.

    Attributes:
        epochs: By fingerprint, context and epoch.
        ranks: By rank.
        problems: A line for each thing that must not be.
    """

    epochs: dict[tuple[str, int, int], EpochCount] = field(default_factory=dict)
    ranks: dict[int, RankCount] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def audit(run: Path) -> None:
    """Check what a run has read: coverage, repeats and gaps, by dataset and rank.

    Ends with exit code 1 if a block was read twice in an epoch, an epoch has gaps though a later one has begun, a batch
    is missing in a rank's ledger, or ranks that share blocks have read different ones.

    Args:
        run: Folder of a run, runs/NAME/version_N.
    """
    found = audit_run(run)
    print(report(found))
    if found.problems:
        print("\n".join(f"problem: {problem}" for problem in found.problems), file=sys.stderr)
        raise SystemExit(ExitCode.BUG)


def audit_run(run: Path) -> Audit:
    """Read the ledger of a run.

    Raises:
        UserError: it has none, or a line is damaged.
    """
    files = ledger_files(expand_home(run) / FOLDER_NAME)
    if 0 not in files:
        raise UserError(f"{run}: no {FOLDER_NAME}/rank0.jsonl found; give the folder of a run, runs/NAME/version_N")
    found = Audit()
    hashes: dict[tuple[int, int], tuple[str, int]] = {}
    for rank, path in files.items():
        _add_rank(found, rank, path, hashes)
    # The last line of either, which a kill cut short, is a batch that is known to have been.
    more = is_cut_short(files[0])
    for rank, count in found.ranks.items():
        if rank == 0:
            continue
        due = sum(number for world_size, number in found.ranks[0].by_world_size.items() if world_size > rank)
        if not due - is_cut_short(files[rank]) <= count.batches <= due + more:
            found.problems.append(f"rank {rank}: {count.batches} batches, {due} were due: as many as rank 0 has read")
    _check_epochs(found)
    return found


def _add_rank(found: Audit, rank: int, path: Path, hashes: dict[tuple[int, int], tuple[str, int]]) -> None:
    header: LedgerHeader | None = None
    count = found.ranks[rank] = RankCount()
    expected = None
    for entry in read_ledger(path):
        if isinstance(entry, LedgerHeader):
            header = entry
            if expected is None and entry.batch and rank == 0:
                found.problems.append(f"rank {rank}: the ledger begins at batch {entry.batch}")
            # Other ranks than the first may have been away for some time: then there were fewer.
            expected = entry.batch if expected is None or rank else expected
            continue
        if header is None:
            raise UserError(f"{path}:1 is damaged: the first line does not describe what follows")
        if entry.batch != expected:
            found.problems.append(f"rank {rank}: batch {entry.batch} follows where {expected} was due")
        expected = entry.batch + 1
        _add_batch(found, count, header, entry)
        count.first_step = count.first_step or entry.step
        if header.ranks_per_block > 1:
            known, other = hashes.setdefault((entry.batch, rank // header.ranks_per_block), (entry.hash, rank))
            if known != entry.hash:
                found.problems.append(f"batch {entry.batch}: ranks {other} and {rank} share blocks and read others")


def _add_batch(found: Audit, count: RankCount, header: LedgerHeader, entry: LedgerBatch) -> None:
    count.batches += 1
    count.by_world_size[header.world_size] += 1
    count.last_step = entry.step
    is_first_reader = header.rank % header.ranks_per_block == 0
    for number, epoch, chunk, block in entry.blocks:
        dataset = header.datasets[number]
        count.tokens += header.seq_len
        count.by_dataset[dataset.name] += header.seq_len
        if not is_first_reader:
            continue
        key = dataset.fingerprint, header.seq_len, epoch
        if key not in found.epochs:
            found.epochs[key] = EpochCount(dataset, epoch, header.seq_len)
        of_epoch = found.epochs[key]
        if len(header.datasets) == 1:
            of_epoch.dropped = max(
                of_epoch.dropped, header.world_size // header.ranks_per_block * header.batch_size - 1
            )
        of_epoch.add(chunk, block)


def _check_epochs(found: Audit) -> None:
    last: Counter[tuple[str, int]] = Counter()
    for fingerprint, seq_len, epoch in found.epochs:
        last[fingerprint, seq_len] = max(last[fingerprint, seq_len], epoch)
    for (fingerprint, seq_len, epoch), count in sorted(found.epochs.items()):
        name = f"{count.dataset.name}, epoch {epoch}"
        if count.repeats:
            found.problems.append(f"{name}: {count.repeats} block(s) read again")
        missing = count.total - count.seen
        if epoch < last[fingerprint, seq_len] and missing > count.dropped:
            found.problems.append(f"{name}: {missing} block(s) never read, though the next epoch has begun")


def report(found: Audit) -> str:
    """The findings as text."""
    lines = ["dataset epoch: blocks seen, share of all, repeats, tokens"]
    for (_, seq_len, epoch), count in sorted(found.epochs.items(), key=lambda item: (item[1].dataset.name, item[0])):
        seen = count.seen
        lines.append(
            f"  {count.dataset.name} {epoch}: {seen:,} of {count.total:,} ({seen / count.total:.1%}), "
            f"{count.repeats} repeats, {seen * seq_len:,} tokens"
        )
    lines.append("rank: batches, steps, tokens by dataset")
    for rank, of_rank in found.ranks.items():
        shares = ", ".join(
            f"{name} {tokens:,} ({tokens / of_rank.tokens:.1%})" for name, tokens in sorted(of_rank.by_dataset.items())
        )
        lines.append(
            f"  {rank}: {of_rank.batches:,}, {of_rank.first_step} to {of_rank.last_step}, {shares or 'nothing'}"
        )
    lines.append(f"problems: {len(found.problems)}")
    return "\n".join(lines)
