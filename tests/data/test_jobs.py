"""Jobs: their order, what is done again after a kill or a failure, and what is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from muse_lightning.data import jobs
from muse_lightning.data.jobs import Job, Meter, run_jobs
from muse_lightning.data.progress import StageProgress
from muse_lightning.errors import UserError

set_result = Future.set_result

KINDS = [
    pytest.param({"num_workers": 1}, id="here"),
    pytest.param({"num_workers": 2, "in_threads": True}, id="threads"),
    pytest.param({"num_workers": 2}, id="processes", marks=pytest.mark.multi_process),
]


@dataclass(frozen=True)
class Square(Job):
    """Writes the square of a number; may fail, be slow, or kill its process."""

    number: int
    fault: str = ""
    size: int = 10

    @property
    def key(self) -> str:  # follows from the number
        return f"n{self.number}"

    def run(self, folder: Path, context: Any, meter: Meter) -> dict[str, Any]:
        (folder / "square").write_text(str(self.number**2))
        if self.fault == "user":
            raise UserError("found a mistake")
        if self.fault == "disk":
            raise OSError(28, "No space left on device")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "kill in lock":
            jobs._worker[3].acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "slow":
            for _ in range(600):
                time.sleep(0.05)
                meter(0, 0, 0)
        meter(self.size, 1, 2)
        return {"number": self.number, "context": context}


def run(root: Path, jobs: list[Square], progress: StageProgress | None = None, **kind) -> list[tuple[str, int]]:
    progress = progress or StageProgress("testing", 100)
    return [
        ((folder / "square").read_text(), result["number"]) for folder, result in run_jobs(root, jobs, progress, **kind)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_results_in_the_order_of_the_jobs(tmp_path, kind):
    progress = StageProgress("testing", 100)
    squares = [Square(number) for number in range(20)]
    assert run(tmp_path, squares, progress, **kind) == [(str(n * n), n) for n in range(20)]
    assert progress.totals() == (200, 20, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(job.key for job in squares)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_finished_is_not_done_again(tmp_path, kind):
    run(tmp_path, [Square(number) for number in range(4)], **kind)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("square")}
    os.truncate(tmp_path / "n2" / "square", 0)
    (tmp_path / ".n9.partial-1-1").mkdir()
    progress = StageProgress("testing", 100)
    assert run(tmp_path, [Square(number) for number in range(1, 6)], progress, **kind)[1] == ("4", 2)
    after = {path: path.stat().st_ino for path in tmp_path.rglob("square")}
    assert {path.parent.name for path in before if after.get(path) == before[path]} == {"n1", "n3"}
    assert progress.finished_before == 2
    assert progress.totals()[1] == 3
    # n0 belongs to no job any more.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n1", "n2", "n3", "n4", "n5"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fault", "error"), [("user", UserError), ("disk", OSError)])
def test_a_failure_is_told_and_leaves_what_was_finished(tmp_path, kind, fault, error):
    with pytest.raises(error, match=r"found a mistake|No space left"):
        run(tmp_path, [Square(0), Square(1, fault), *(Square(n, "slow") for n in (2, 3))], **kind)
    assert [path.name for path in tmp_path.iterdir()] == ["n0"]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_nobody_waits_for_jobs_that_are_not_asked_for(tmp_path, kind):
    start = time.monotonic()
    results = run_jobs(tmp_path, [Square(0), *(Square(n, "slow") for n in range(1, 9))], StageProgress("t", 9), **kind)
    next(results)
    results.close()
    assert time.monotonic() - start < 20
    assert [path.name for path in tmp_path.iterdir()] == ["n0"]


def test_jobs_are_made_as_they_are_needed(tmp_path):
    made = []

    def jobs() -> Iterator[Square]:
        for number in range(50):
            made.append(number)
            yield Square(number)

    results = run_jobs(tmp_path, jobs(), StageProgress("testing", 100), num_workers=2, in_threads=True)
    next(results)
    assert len(made) < 15
    results.close()


@pytest.mark.multi_process
def test_a_killed_process_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a preparation process was killed, most likely for lack of memory; .*kept"):
        run(tmp_path, [Square(0, "kill"), Square(1)], num_workers=2)


@pytest.mark.multi_process
def test_a_result_is_not_sent_but_found_in_its_folder(tmp_path, monkeypatch):
    results = []
    monkeypatch.setattr(
        Future, "set_result", lambda future, result: (results.append(result), set_result(future, result))
    )
    assert run(tmp_path, [Square(n) for n in range(3)], num_workers=2) == [("0", 0), ("1", 1), ("4", 2)]
    assert results == [None] * 3


@pytest.mark.multi_process
def test_a_process_killed_while_it_counts_is_one_line_too(tmp_path):
    """Others wait for its lock then, some of them for ever."""
    start = time.monotonic()
    progress = StageProgress("testing", 100)
    with pytest.raises(UserError, match="a preparation process was killed"):
        run(tmp_path, [Square(n, "slow" if n else "kill in lock") for n in range(8)], progress, num_workers=3)
    assert time.monotonic() - start < 30
    assert not list(tmp_path.glob("n*"))


@pytest.mark.multi_process
def test_processes_import_nothing_from_the_working_directory(tmp_path):
    """Nor does the process that keeps count of their locks, which is started with the first of these."""
    working_directory = tmp_path / "working_directory"
    working_directory.mkdir()
    for module in ("signal", "struct", "random", "selectors", "tempfile", "pickle", "numpy"):
        (working_directory / f"{module}.py").write_text(f"open('trace', 'a').write({module!r})\nraise ImportError\n")
    script = (
        "from tests.data.test_jobs import *\n"
        "if __name__ == '__main__':\n"
        "    assert run(Path('jobs'), [Square(2)], num_workers=2) == [('4', 2)]\n"
        "    assert 'PYTHONSAFEPATH' not in os.environ\n"
    )
    (tmp_path / "main.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("PYTHONSAFEPATH", None)
    subprocess.run([sys.executable, str(tmp_path / "main.py")], cwd=working_directory, env=environment, check=True)
    assert not (working_directory / "trace").exists()


@pytest.mark.multi_process
def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    script = (
        "from tests.data.test_jobs import *\n"
        "if __name__ == '__main__':\n"
        "    run(Path('.'), [Square(n, 'slow') for n in range(4)], num_workers=2)\n"
    )
    (tmp_path / "main.py").write_text(script)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)})
    try:
        wait_for(lambda: len(list(tmp_path.glob(".n*.partial-*"))) == 2)
        processes = {int(path.name.split("-")[1]) for path in tmp_path.glob(".n*.partial-*")}
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(is_running(process) for process in processes))


def wait_for(condition) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
