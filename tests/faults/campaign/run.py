"""One run of the campaign: the same command line, disturbed and started again until it is done, then compared."""

import json
import random
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.campaign import files
from tests.faults.campaign.faults import ALL_RANKS, KILLED, KINDS, Fault, draw, possible
from tests.faults.campaign.oracle import (
    COMMAND,
    Oracle,
    RankTrace,
    checkpoint_digest,
    enter,
    logged_losses,
    read_events,
    trace,
)
from tests.faults.campaign.probe import Instant, Probe
from tests.faults.campaign.processes import GRACE_S, Ended, Start, adopt_orphans, own_loopback
from tests.faults.campaign.setting import MAX_STEPS, Setting, lay_out, run_of

MOST_STARTS = 24
FEWEST_FAULTS = 3
SHORT_TOUR = (
    "kill",
    "kill_in_save",
    "term_twice_in_save",
    "second_run",
    "save_fails",
    "disk_full",
    "checkpoint_bit",
    "chunk_bit",
    "stale_lock",
)
"""Kinds that differ most in what they ask of the code."""


@dataclass
class Record:
    """One injection and what came of it."""

    seed: int
    start: int
    kind: str
    instant: str
    amount: float
    setting: dict[str, Any]
    has_struck: bool = False
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    """That the start took which it struck in."""
    recomputed: int | None = None
    """Steps that had been trained and were not in the newest whole checkpoint."""
    first_step_s: float | None = None
    """Seconds from the next start to the end of its first step."""
    lost: int = 0
    repeated: int = 0
    unlogged: int = 0
    """Steps that are saved and not in TensorBoard: the process ended between the two."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a seed stands for."""

    setting: Setting
    starts: list[list[Fault]]
    """Faults of each start; of those after them, none."""


def make_plan(seed: int, has_mounts: bool, kinds: Sequence[str] | None = None, setting: Setting | None = None) -> Plan:
    """Draw a setting and its faults: three or four that end a start, and others before and beside them.

    Args:
        seed: of all that is drawn.
        has_mounts: see `possible`.
        kinds: to draw from; None: all.
        setting: None: drawn.
    """
    rng = random.Random(seed)
    drawn = Setting(rng.choice((1, 1, 2)), rng.choice((1, 1, 2)), rng.choice((0, 2)), rng.random() < 0.5)
    setting = setting or drawn
    names = [name for name in possible(setting, has_mounts) if kinds is None or name in kinds]
    going_on = [name for name in names if KINDS[name].goes_on]
    ending = [name for name in names if not KINDS[name].goes_on]
    starts = []
    for _ in range(rng.choice((3, 4))):
        chosen = [rng.choice(going_on) for _ in range(rng.choice((0, 1, 1, 2))) if going_on]
        if ending:
            chosen.append(rng.choice(ending))
        starts.append([draw(rng, name, setting) for name in dict.fromkeys(chosen)])
    return Plan(setting, starts)


def tour(has_mounts: bool, is_short: bool) -> list[Plan]:
    """Plans in which every kind of fault is planted where it strikes: the short one of a few kinds on one rank, or
    those of all others, on one rank and, what needs two, on two."""
    settings = [Setting()]
    if not is_short:
        settings = [Setting(workers=2), Setting(accumulate=2, is_asynchronous=False), Setting(), Setting(ranks=2)]
    rng = random.Random(0)
    chosen: list[list[str]] = [[] for _ in settings]
    for number, (name, kind) in enumerate(KINDS.items()):
        homes = [
            index
            for index, setting in enumerate(settings)
            if setting.ranks == kind.ranks and name in possible(setting, has_mounts)
        ]
        if homes and (name in SHORT_TOUR) == is_short:
            chosen[homes[number % len(homes)]].append(name)
    return [_tour_of(names, setting, rng) for names, setting in zip(chosen, settings, strict=True)]


def _tour_of(names: list[str], setting: Setting, rng: random.Random) -> Plan:
    """First a few checkpoints, so that one may be damaged; then each fault that ends a start; in the last start those
    that the training survives, which must not be ended before they strike."""
    saves = Fault("term", Instant("batch", 12 * setting.accumulate), ALL_RANKS, 0.0)
    faults = [draw(rng, name, setting, last_batch=3, last_save=1) for name in names]
    starts = [[fault] for fault in faults if not KINDS[fault.kind].goes_on]
    planted = [fault for fault in faults if KINDS[fault.kind].goes_on and fault.instant is None]
    for number, fault in enumerate(planted):
        starts[number % len(starts)].insert(0, fault)
    return Plan(setting, [[saves], *starts, [fault for fault in faults if fault.instant and KINDS[fault.kind].goes_on]])


class Run:
    """One run. Use it in a process of its own: it mounts a file system there.

    Args:
        seed: for the records.
        plan: what happens.
        folder: an empty folder for notes, logs and the working directory.
        prepared: where the datasets are.
        oracle: the undisturbed run of the same setting.
        stops_at_problem: end with the first start that has one.
    """

    def __init__(
        self, seed: int, plan: Plan, folder: Path, prepared: Path, oracle: Oracle, stops_at_problem: bool = False
    ) -> None:
        self.seed = seed
        self.plan = plan
        self.folder = folder
        self.work = folder / "work"
        self.prepared = prepared
        self.oracle = oracle
        self.stops_at_problem = stops_at_problem
        self.records: list[Record] = []
        self._pending: list[Record] = []
        self._saved_last: set[int] = set()
        """Steps that were saved, by a start that came no further and was not asked to stop."""

    def __call__(self) -> list[Record]:
        """Start until it is done, and compare."""
        self.work.mkdir(parents=True)
        files.mount_disk(self.work)
        own_loopback()
        adopt_orphans()
        lay_out(self.work, self.prepared, self.plan.setting)
        for number in range(MOST_STARTS):
            faults = self.plan.starts[number] if number < len(self.plan.starts) else []
            if self._start(number, faults):
                break
            if self.stops_at_problem and any(record.problems for record in self.records):
                return self.records
        else:
            self._blame([f"not done after {MOST_STARTS} starts"])
        self._blame(self._compare_whole())
        return self.records

    def _blame(self, problems: list[str]) -> None:
        if problems:
            self.records[-1].problems += problems

    def _start(self, number: int, faults: list[Fault]) -> bool:
        """One start; whether the run is done."""
        planted = [fault for fault in faults if self._plant(fault)]
        records = {
            fault: Record(
                self.seed, number, fault.kind, str(fault.instant or "before"), fault.amount, asdict(self.plan.setting)
            )
            for fault in planted
        }
        whole = files.newest_whole(self.work)
        seconds: list[int] = []
        ended, began = self._launch(f"start{number}", planted, lambda: self._while_stopped(planted, seconds))
        for fault in planted:
            if (mend := KINDS[fault.kind].mend) is not None:
                mend(self.work, fault)
        events = [read_events(self.folder / f"start{number}.events", rank) for rank in range(self.plan.setting.ranks)]
        struck = {event["instant"] for of_rank in events for event in of_rank if event["event"] == "struck"}
        for fault, record in records.items():
            record.has_struck = fault.instant is None or str(fault.instant) in struck
            record.codes, record.seconds = ended.codes, round(ended.seconds, 2)
        self.records += records.values()
        problems = self._judge_start(ended, events, whole, began)
        has_looked = any(event["event"] == "folder" for event in events[0])
        struck_faults = [fault for fault, record in records.items() if record.has_struck]
        problems += self._judge_ending(ended, struck_faults, has_looked, self._unheard(events))
        problems += [f"a second run ended with {code} instead of 75" for code in seconds if code != 75]
        trained = max([whole, *(event["step"] for event in events[0] if event["event"] == "end")])
        left = files.newest_whole(self.work)
        for fault, record in records.items():
            if record.has_struck and not KINDS[fault.kind].goes_on:
                record.recomputed = max(0, trained - left)
                if record.recomputed and not KINDS[fault.kind].recomputes and 75 in ended.codes:
                    problems.append(f"{fault.kind}: {record.recomputed} steps are not in the checkpoint")
        last = next((event for event in reversed(events[0]) if event["event"] in ("begin", "end")), None)
        if ended.codes[0] not in (0, 75) and last is not None and last["event"] == "end" and last["step"] == left:
            self._saved_last.add(left)
        self._pending = [record for record in records.values() if record.has_struck] or self._pending
        if problems and not self.records:
            raise AssertionError(f"seed {self.seed}: {problems} without a fault\n{ended.log}")
        self._blame(problems)
        return not any(ended.codes) and left == MAX_STEPS

    def _plant(self, fault: Fault) -> bool:
        plant = KINDS[fault.kind].plant
        return plant is None or plant(self.work, fault) is not False

    def _launch(
        self, name: str, faults: list[Fault], when_stopped: Callable[[], None], grace_s: float = GRACE_S
    ) -> tuple[Ended, float]:
        def inside(rank: int) -> None:
            strikes = [
                (fault.instant, _strike(fault))
                for fault in faults
                if fault.instant is not None and fault.rank in (rank, ALL_RANKS)
            ]
            enter(self.folder / f"{name}.events", rank, strikes)

        began = time.monotonic()
        start = Start(COMMAND, self.work, self.plan.setting.ranks, inside, self.folder / f"{name}.log", grace_s)
        return start.run(when_stopped), began

    def _while_stopped(self, faults: list[Fault], seconds: list[int]) -> None:
        """What happens while a rank is stopped: time passes, or somebody starts the command again."""
        for fault in faults:
            if KINDS[fault.kind].when_stopped == "wait":
                time.sleep(0.02 + 0.2 * fault.amount)
            elif KINDS[fault.kind].when_stopped == "second" and files.newest_whole(self.work):
                # Its second rank waits in vain for the first: no signal interrupts that.
                ended, _ = self._launch(f"second{len(seconds)}", [], lambda: None, grace_s=0.3)
                seconds.append(ended.codes[0])

    def _judge_start(self, ended: Ended, events: list[list[dict[str, Any]]], whole: int, began: float) -> list[str]:
        """Where it went on from, and whether every state and batch is the oracle's."""
        problems = ["hung"] if ended.has_hung else []
        folders = [event for event in events[0] if event["event"] == "folder"]
        resumed = folders[-1]["resumed"] if folders else None
        if resumed not in (None, whole):
            problems.append(f"resumed from step {resumed}, the newest whole checkpoint is of step {whole}")
        for rank, of_rank in enumerate(events):
            first = next((event for event in of_rank if event["event"] == "begin"), None)
            if first is not None and resumed is not None:
                due = resumed * self.plan.setting.accumulate
                self._count(max(0, first["batch"] - due), max(0, due - first["batch"]))
            problems += [f"rank {rank}: {line}" for line in differences(trace(of_rank), self.oracle.ranks[rank])]
        done = next((event["time"] for event in events[0] if event["event"] == "end"), None)
        if done is not None:
            for record in self._pending:
                record.first_step_s = round(done - began, 3)
            self._pending = []
        return problems

    def _count(self, lost: int, repeated: int) -> None:
        if self.records:
            self.records[-1].lost += lost
            self.records[-1].repeated += repeated

    def _unheard(self, events: list[list[dict[str, Any]]]) -> set[str]:
        """Instants that struck in a step that was the last: whatever ended it may have come before the ranks agreed on
        what had been asked for."""
        return {instant for of_rank in events for instant in self._unheard_of(of_rank)}

    def _unheard_of(self, events: list[dict[str, Any]]) -> set[str]:
        struck: dict[str, int] = {}
        step = 0
        for event in events:
            if event["event"] == "begin":
                step = event["batch"] // self.plan.setting.accumulate
            elif event["event"] == "struck":
                struck[event["instant"]] = step
        return {instant for instant, of_step in struck.items() if of_step == step}

    def _judge_ending(
        self, ended: Ended, faults: list[Fault], has_looked: bool, unheard: Collection[str] = ()
    ) -> list[str]:
        """Whether exit code and words are what the faults that have struck ask for.

        Args:
            ended: the start.
            faults: those that have struck.
            has_looked: whether it came to choose a checkpoint; else it has said nothing of any.
            unheard: instants at which a signal may have come too late to be told of.
        """
        ending = [fault for fault in faults if not KINDS[fault.kind].goes_on]
        others = [fault for fault in faults if KINDS[fault.kind].goes_on and (fault.instant or has_looked)]
        others = [fault for fault in others if fault.kind != "save_on_usr1" or str(fault.instant) not in unheard]
        codes = KINDS[ending[0].kind].codes if ending else frozenset({0})
        code = ended.codes[0]
        if code in (75, -signal.SIGTERM) and ended.first_code not in (0, code):
            # The launcher stopped it because another rank had failed; that one's code is what it reports.
            code = ended.first_code
        problems = []
        if code not in codes:
            problems.append(f"ended with {ended.codes}; right: {sorted(codes)}; {_last_line(ended.logs[0])}")
        if code != KILLED:
            said = [KINDS[fault.kind].says for fault in [*others, *(ending if code else [])]]
            problems += [f"the log does not say {words!r}" for words in said if words not in ended.log]
        # What a dead process did to the others is a bug's ending; so is what an interrupted one did, if they come to it
        # before the launcher ends them.
        problems += [
            f"rank {rank}: a traceback; {_last_line(log)}"
            for rank, (of_rank, log) in enumerate(zip(ended.codes, ended.logs, strict=True))
            if "Traceback" in log and not (of_rank == 1 and (code == 1 or (code == 130 and " by peer" in log)))
        ]
        return problems

    def _compare_whole(self) -> list[str]:
        """Whether the whole run is the oracle's: ledger, last checkpoint, what was logged."""
        problems = []
        for rank, of_rank in enumerate(self.oracle.ranks):
            lines = (run_of(self.work) / "ledger" / f"rank{rank}.jsonl").read_text().splitlines()
            noted = [entry for entry in map(json.loads, lines) if "hash" in entry]
            numbers = [entry["batch"] for entry in noted]
            lost, repeated = len(set(of_rank.batches) - set(numbers)), len(numbers) - len(set(numbers))
            self._count(lost, repeated)
            if lost or repeated or numbers != sorted(numbers):
                problems.append(f"rank {rank}: ledger: {lost} batches lost, {repeated} repeated")
            wrong = [entry["batch"] for entry in noted if entry["hash"] != of_rank.batches[entry["batch"]][0]]
            if wrong:
                problems.append(f"rank {rank}: ledger: other tokens in batches {wrong[:5]}")
        if checkpoint_digest(self.work) != self.oracle.checkpoint:
            problems.append("the last checkpoint is not that of the undisturbed run")
        logged = logged_losses(self.work)
        missing = [step for step, loss in self.oracle.logged if (step, loss) not in logged]
        if self.records:
            self.records[-1].unlogged = len(missing)
        # Lightning numbers them from 0.
        is_due = any(step + 1 not in self._saved_last for step in missing)
        if is_due or logged != [row for row in self.oracle.logged if row[0] not in missing]:
            problems.append(f"TensorBoard shows other losses than of the undisturbed run; missing: {missing}")
        return problems


def _strike(fault: Fault) -> Callable[[Probe], None]:
    act = KINDS[fault.kind].act
    assert act is not None
    return lambda probe: act(probe, fault)


def differences(found: RankTrace, wanted: RankTrace) -> list[str]:
    """What differs first between what a start did and the oracle, a line for states and one for batches."""
    lines = []
    for batch, state in sorted(found.states.items()):
        parts = [name for name, value in state.items() if value != wanted.states[batch][name]]
        if parts:
            lines.append(f"before batch {batch}: other {', '.join(parts)}")
            break
    for batch, values in sorted(found.batches.items()):
        if values != wanted.batches[batch]:
            lines.append(f"batch {batch}: {'other loss' if values[0] == wanted.batches[batch][0] else 'other tokens'}")
            break
    return lines


def _last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
