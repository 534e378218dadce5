"""The kinds of faults: what is done, at which instants, and how the start must end that one strikes.

A kind strikes inside of a process (`act`) or is laid out between two starts (`plant`), and may be mended after the
start (`mend`). Those of files are in `files.py`, those of the lock in `locks.py`.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.campaign import files, locks
from tests.faults.campaign.probe import STAGES, Instant, Probe
from tests.faults.campaign.setting import Setting, run_of

KILLED = -int(signal.SIGKILL)
ALL_RANKS = -1
LAST_BATCH = 9
"""Of a start, that a fault is planted at: late enough for a save and a validation, early enough for several faults."""
OPERATIONS = 28
"""Of one save, a few more than it has."""


@dataclass(frozen=True)
class Fault:
    """One fault, drawn."""

    kind: str
    instant: Instant | None
    """None: it is laid out before the start."""
    rank: int
    """That it strikes in, or ALL_RANKS."""
    amount: float
    """In [0, 1): where in a file, how long, how much."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        codes: exit codes of the first rank that are right.
        says: what the log must have, unless the start ended with 0 or by a kill.
        points: of an Instant, at which it may strike.
        act: in the process, at the instant.
        plant, mend: before and after the start, with the working directory and the fault.
        when_stopped: while a rank is stopped.
        goes_on: the training is to go on, so that another fault may follow in the same start.
        ranks, workers: the fewest that it needs.
        rank: the rank it strikes in; ALL_RANKS: in all of them; None: drawn.
        recomputes: whether steps may be lost that had been trained.
    """

    codes: frozenset[int]
    says: str = ""
    points: tuple[str, ...] = ()
    act: Callable[[Probe, Fault], None] | None = None
    plant: Callable[[Path, Fault], object] | None = None
    mend: Callable[[Path, Fault], object] | None = None
    when_stopped: str = ""
    goes_on: bool = False
    ranks: int = 1
    workers: int = 0
    rank: int | None = 0
    recomputes: bool = True


def _kill_all(probe: Probe, fault: Fault) -> None:
    os.killpg(0, signal.SIGKILL)


def _signal_self(number: signal.Signals) -> Callable[[Probe, Fault], None]:
    return lambda probe, fault: os.kill(os.getpid(), number)


def _signal_group(probe: Probe, fault: Fault) -> None:
    """As a scheduler: data workers get it too, and not from their own trainer."""
    sender = os.fork()
    if sender == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        os._exit(0)
    os.waitpid(sender, 0)


def _twice(probe: Probe, fault: Fault) -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.002)


def _kill_worker(probe: Probe, fault: Fault) -> None:
    import multiprocessing

    workers = sorted(child.pid for child in multiprocessing.active_children() if child.pid is not None)
    os.kill(workers[int(fault.amount * len(workers))], signal.SIGKILL)


def _fail_save(probe: Probe, fault: Fault) -> None:
    code = files.STORAGE_ERRORS[int(fault.amount * len(files.STORAGE_ERRORS))]
    probe.operation_error = OSError(code, os.strerror(code))


def _fill_disk(probe: Probe, fault: Fault) -> None:
    files.fill(run_of(Path()), int(fault.amount * 300_000))


def _replace_dataset(probe: Probe, fault: Fault) -> None:
    files.replace_dataset(Path(), fault)


_PREEMPTED = frozenset({75, 0})
"""0: the signal came when the last step had been saved."""

KINDS: dict[str, Kind] = {
    "kill": Kind(frozenset({KILLED}), points=("batch",), act=_kill_all, rank=None),
    "kill_in_save": Kind(frozenset({KILLED}), points=("save",), act=_kill_all),
    "kill_in_validation": Kind(frozenset({KILLED}), points=("validation",), act=_kill_all, rank=None),
    "kill_at_start": Kind(frozenset({KILLED}), points=STAGES, act=_kill_all),
    "term": Kind(
        _PREEMPTED, "preempted", ("batch", "validation"), _signal_self(signal.SIGTERM), rank=ALL_RANKS, recomputes=False
    ),
    "term_group": Kind(_PREEMPTED, "preempted", ("batch", "save"), _signal_group, workers=1, recomputes=False),
    "term_at_start": Kind(_PREEMPTED, "preempted", STAGES, _signal_self(signal.SIGTERM), rank=ALL_RANKS),
    "term_rank_1": Kind(
        _PREEMPTED,
        "preempted",
        ("batch", "validation"),
        _signal_self(signal.SIGTERM),
        ranks=2,
        rank=1,
        recomputes=False,
    ),
    "term_twice_in_save": Kind(_PREEMPTED, "preempted", ("save",), _twice, recomputes=False),
    "interrupt": Kind(frozenset({130}), points=("batch", "validation"), act=_signal_self(signal.SIGINT)),
    "save_on_usr1": Kind(frozenset({0}), "SIGUSR1", ("batch",), _signal_self(signal.SIGUSR1), goes_on=True, rank=None),
    "stop_and_continue": Kind(
        frozenset({0}),
        points=("batch", "save", "validation"),
        act=_signal_self(signal.SIGSTOP),
        when_stopped="wait",
        goes_on=True,
    ),
    "second_run": Kind(
        frozenset({0}), points=("batch",), act=_signal_self(signal.SIGSTOP), when_stopped="second", goes_on=True
    ),
    "rank_dies": Kind(
        frozenset({1}),
        "by peer",
        points=("batch",),
        act=_signal_self(signal.SIGKILL),
        ranks=2,
        rank=1,
    ),
    "worker_dies": Kind(frozenset({1}), "a data worker died", ("batch",), _kill_worker, workers=1, rank=None),
    "save_fails": Kind(frozenset({0}), "was not saved", ("save",), _fail_save, goes_on=True),
    "disk_full": Kind(frozenset({77, 0}), "No space left on device", ("batch", "save"), _fill_disk, mend=files.empty),
    "read_only": Kind(frozenset({77}), "Read-only file system", plant=files.read_only, mend=files.writable),
    "checkpoint_bit": Kind(frozenset({0}), "is not used", plant=files.damage_checkpoint, goes_on=True),
    "checkpoint_cut": Kind(frozenset({0}), "is not used", plant=files.damage_checkpoint, goes_on=True),
    "checkpoint_zeros": Kind(frozenset({0}), "is not used", plant=files.damage_checkpoint, goes_on=True),
    "manifest_bit": Kind(frozenset({0}), plant=files.damage_checkpoint, goes_on=True),
    "times_mixed": Kind(frozenset({0}), plant=files.mix_times, goes_on=True),
    "chunk_bit": Kind(frozenset({2, 0}), "is damaged", plant=files.damage_chunk, mend=files.mend_chunks),
    "chunk_cut": Kind(frozenset({2}), "prepare the dataset again", plant=files.damage_chunk, mend=files.mend_chunks),
    "chunk_zeros": Kind(frozenset({2, 0}), "is damaged", plant=files.damage_chunk, mend=files.mend_chunks),
    "dataset_replaced": Kind(frozenset({2, 0}), "data chunk", ("batch",), _replace_dataset, mend=files.mend_dataset),
    "dataset_other": Kind(frozenset({2}), "checkpoint", plant=files.replace_dataset, mend=files.mend_dataset),
    "stale_lock": Kind(frozenset({0}), plant=locks.stale, goes_on=True),
    "lock_elsewhere": Kind(frozenset({75}), "is in use by", plant=locks.elsewhere, mend=locks.end_elsewhere),
}


def possible(setting: Setting, has_mounts: bool) -> list[str]:
    """The kinds that a setting can have.

    Args:
        has_mounts: whether a file system can be mounted for a run, which those need that fill it or write-protect it.
    """
    return [
        name
        for name, kind in KINDS.items()
        if setting.ranks >= kind.ranks
        and setting.workers >= kind.workers
        and (has_mounts or name not in ("disk_full", "read_only"))
    ]


def draw(rng: random.Random, name: str, setting: Setting, last_batch: int = LAST_BATCH, last_save: int = 2) -> Fault:
    """A fault of a kind at a random instant, the last batch and save of its start that it may strike at given."""
    kind = KINDS[name]
    rank = rng.randrange(setting.ranks) if kind.rank is None else kind.rank
    instant = None
    if kind.points:
        point = rng.choice(kind.points)
        most = {"batch": last_batch * setting.accumulate, "validation": 2, "save": last_save}.get(point, 1)
        operation = rng.randrange(OPERATIONS) if point == "save" else 0
        instant = Instant(point, rng.randint(1, most), operation)
    return Fault(name, instant, rank, rng.random())
