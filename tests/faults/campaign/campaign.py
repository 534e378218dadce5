"""Many runs, each in a fork of the warm server."""

import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from tests.faults.campaign import files
from tests.faults.campaign.oracle import Oracle, make_oracle, prepare_datasets
from tests.faults.campaign.processes import import_everything
from tests.faults.campaign.run import Plan, Record, Run, make_plan, tour
from tests.faults.campaign.setting import Setting


class Campaign:
    """Use as a context manager, in a process of one thread.

    Args:
        kinds: of faults; None: all.
        setting: of every run; None: drawn for each.
        keeps_logs: whether the folder of every run stays, not only of those with a problem.
        is_quiet: print no problems, and keep no logs of them.
        stops_at_problem: end a run with the first start that has one.
        mutate: called in the process of each run, before it: puts a mistake into the code under test.
    """

    def __init__(
        self,
        kinds: Sequence[str] | None = None,
        setting: Setting | None = None,
        keeps_logs: bool = False,
        is_quiet: bool = False,
        stops_at_problem: bool = False,
        mutate: Callable[[], None] = lambda: None,
    ) -> None:
        self.kinds = kinds
        self.setting = setting
        self.keeps_logs = keeps_logs
        self.is_quiet = is_quiet
        self.stops_at_problem = stops_at_problem
        self.mutate = mutate
        self._oracles: dict[Setting, Oracle] = {}

    def __enter__(self) -> "Campaign":
        import_everything()
        self.folder = Path(tempfile.mkdtemp(prefix="campaign-"))
        self._prepared = self.folder / "prepared"
        self._prepared.mkdir()
        prepare_datasets(self._prepared)
        self.has_mounts = self._can_mount()
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._prepared)
        if not any(path.name.startswith("seed") for path in self.folder.iterdir()):
            shutil.rmtree(self.folder)
        else:
            print(f"logs: {self.folder}")

    def _can_mount(self) -> bool:
        folder = self.folder / "mount"
        folder.mkdir()
        can = _in_fork(lambda: files.mount_disk(folder)) is True
        folder.rmdir()
        return can

    def plan(self, seed: int) -> Plan:
        """What a seed stands for here."""
        return make_plan(seed, self.has_mounts, self.kinds, self.setting)

    def oracle(self, setting: Setting) -> Oracle:
        """The undisturbed run, trained when it is first asked for."""
        if setting.oracle not in self._oracles:
            folder = self.folder / f"oracle{len(self._oracles)}"
            self._oracles[setting.oracle] = make_oracle(folder, self._prepared, setting.oracle)
            shutil.rmtree(folder)
        return self._oracles[setting.oracle]

    def run(self, seeds: Iterable[int]) -> list[Record]:
        """One run after the other."""
        return [record for seed in seeds for record in self._written(self._started(seed)())]

    def run_tour(self, is_short: bool) -> list[Record]:
        """A few kinds of fault, or all others."""
        plans = tour(self.has_mounts, is_short)
        return [record for number, plan in enumerate(plans) for record in self._written(self._started(number, plan)())]

    def run_for(
        self, seed: int, seconds: float, most: int | None = None, processes: int = 1, out: Path | None = None
    ) -> list[Record]:
        """Runs from a seed on, for a time.

        Args:
            seed: of the first.
            seconds: after which none starts.
            most: runs; None: as many as fit.
            processes: runs at a time.
            out: file that records are appended to.
        """
        began = time.monotonic()
        records: list[Record] = []
        running: list[Callable[[], list[Record]]] = []
        for number in count() if most is None else range(most):
            if time.monotonic() - began >= seconds:
                break
            running.append(self._started(seed + number))
            if len(running) == processes:
                records += self._written(running.pop(0)(), out)
        for join in running:
            records += self._written(join(), out)
        return records

    def _written(self, records: list[Record], out: Path | None = None) -> list[Record]:
        """The same, told of and written down."""
        for record in records:
            for line in () if self.is_quiet else record.problems:
                print(f"seed {record.seed} start {record.start} {record.kind} at {record.instant}: {line}", flush=True)
        if out is not None:
            with out.open("a") as file:
                file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
        return records

    def _started(self, seed: int, plan: Plan | None = None) -> Callable[[], list[Record]]:
        """Start a run; the function returned waits for it."""
        plan = plan or self.plan(seed)
        oracle = self.oracle(plan.setting)
        folder = self.folder / f"seed{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

        def run() -> list[dict[str, Any]]:
            self.mutate()
            disturbed = Run(seed, plan, folder, self._prepared, oracle, self.stops_at_problem)
            try:
                records = disturbed()
            except Exception:
                # What is left of it cannot be compared: a missing file, or one that cannot be read.
                records = disturbed.records or [Record(seed, 0, "none", "", 0.0, asdict(plan.setting))]
                records[-1].problems.append(traceback.format_exc().strip().replace("\n", " | "))
            if not self.is_quiet and any(record.problems for record in records):
                shutil.copytree(folder / "work" / "runs", folder / "runs", dirs_exist_ok=True)
            return [asdict(record) for record in records]

        wait = _forked(run)

        def join() -> list[Record]:
            records = [Record(**record) for record in wait()]
            has_problems = any(record.problems for record in records) and not self.is_quiet
            if not self.keeps_logs and not has_problems:
                shutil.rmtree(folder)
            return records

        return join


def _in_fork(function: Callable[[], Any]) -> Any:
    return _forked(function)()


def _forked(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start a function in a fork; what is returned waits for its result, a JSON value."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            with os.fdopen(writer, "w") as file:
                json.dump(function(), file)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)

    def wait() -> Any:
        with os.fdopen(reader) as file:
            text = file.read()
        os.waitpid(pid, 0)
        return json.loads(text)

    return wait
