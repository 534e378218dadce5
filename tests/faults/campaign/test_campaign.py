"""Every kind of random fault once; mistakes in the code that the campaign must find; a seed is one plan."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from muse_lightning.checkpoints.manifest import Manifest
from muse_lightning.files import sha256_bytes
from tests.faults.campaign import files
from tests.faults.campaign.faults import KINDS, Fault
from tests.faults.campaign.mutants import MUTANTS
from tests.faults.campaign.oracle import Oracle
from tests.faults.campaign.probe import Instant
from tests.faults.campaign.processes import Ended
from tests.faults.campaign.report import table
from tests.faults.campaign.run import FEWEST_FAULTS, Plan, Record, Run, make_plan, tour
from tests.faults.campaign.setting import Setting

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.multi_process
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


def program(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A program of its own: it forks, and must have one thread."""
    command = [sys.executable, "-m", f"tests.faults.campaign{module}", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_seed_is_a_plan() -> None:
    plans = [make_plan(seed, True) for seed in range(200)]
    assert plans == [make_plan(seed, True) for seed in range(200)]
    assert all(len(plan.starts) >= FEWEST_FAULTS for plan in plans)
    assert {fault.kind for plan in plans for start in plan.starts for fault in start} == set(KINDS)
    assert {plan.setting.ranks for plan in plans} == {1, 2}


def test_the_tours_have_every_kind() -> None:
    plans = [*tour(True, is_short=True), *tour(True, is_short=False)]
    assert {fault.kind for plan in plans for start in plan.starts for fault in start} == set(KINDS)


def test_the_table_counts_what_has_struck() -> None:
    struck = Record(1, 0, "kill", "batch 3", 0.5, {}, has_struck=True, recomputed=3, first_step_s=1.5, lost=2)
    missed = Record(1, 1, "term", "batch 3", 0.5, {})
    lines = table([struck, missed], 60.0).splitlines()
    assert lines[2] == "| kill | 1 | 2 | 0 | 0 | 3, 3 | 1.50, 1.50 |"
    assert lines[-1].startswith("1 injections in 1 runs and 1.0 minutes: 60 an hour; 1 more")


TRACEBACK = "Traceback: closed by peer"


@pytest.mark.parametrize(
    ("kind", "codes", "first_code", "logs", "is_right"),
    [
        ("chunk_cut", [2, 75], 2, ["prepare the dataset again", ""], True),
        ("chunk_cut", [75, 2], 2, ["", "prepare the dataset again"], True),
        ("chunk_cut", [-15, 2], 2, ["", "prepare the dataset again"], True),
        ("chunk_cut", [75, 75], 75, ["", "prepare the dataset again"], False),
        ("term_rank_1", [75, 75], 75, ["preempted", "preempted"], True),
        ("term_rank_1", [1, 75], 75, ["", "preempted"], False),
        ("term_rank_1", [75, 75], 75, ["preempted", TRACEBACK], False),
        ("interrupt", [130, 1], 130, ["", TRACEBACK], True),
        ("interrupt", [130, 1], 130, ["", "Traceback: a bug"], False),
        ("rank_dies", [1, -9], -9, [TRACEBACK, ""], True),
        ("rank_dies", [-15, -9], -9, ["", ""], False),
        ("rank_dies", [75, -9], -9, ["preempted", ""], False),
    ],
)
def test_the_ending_of_two_ranks(kind: str, codes: list[int], first_code: int, logs: list[str], is_right: bool) -> None:
    run = Run(0, Plan(Setting(ranks=2), []), Path(), Path(), Oracle([], "", []))
    ended = Ended(codes, "".join(logs), 0.0, logs, first_code)
    assert (run._judge_ending(ended, [Fault(kind, None, 0, 0.0)], True) == []) == is_right


def events(*steps: str) -> list[dict[str, Any]]:
    """What a rank notes of two batches a step: the batch that begins, or what strikes."""
    return [
        {"event": "begin", "batch": int(step)} if step.isdigit() else {"event": "struck", "instant": step}
        for step in steps
    ]


@pytest.mark.parametrize(
    ("noted", "unheard"),
    [
        ([events("0", "a", "1")], {"a"}),
        ([events("0", "a", "1", "2")], set()),
        ([events("0", "1", "a", "2", "3", "b")], {"b"}),
        ([events("0", "a"), events("0", "1", "2", "b", "3")], {"a", "b"}),
        ([[], events("a")], {"a"}),
    ],
)
def test_what_comes_in_the_last_step_may_not_be_heard(noted: list[list[dict[str, Any]]], unheard: set[str]) -> None:
    run = Run(0, Plan(Setting(ranks=2, accumulate=2), []), Path(), Path(), Oracle([], "", []))
    assert run._unheard(noted) == unheard
    ended = Ended([1, -9], TRACEBACK, 0.0, [TRACEBACK, ""], -9)
    asked = [Fault("save_on_usr1", Instant("batch", 1), 0, 0.0), Fault("rank_dies", Instant("batch", 2), 1, 0.0)]
    assert run._judge_ending(ended, asked, True, {"batch 1"}) == []
    assert run._judge_ending(ended, asked, True, {"batch 2"}) == ["the log does not say 'SIGUSR1'"]


def test_the_newest_whole_checkpoint_is_found_without_the_code_under_test(tmp_path: Path) -> None:
    """Behind a bit of its manifest that is flipped, the one before is."""
    folder = tmp_path / "runs/campaign/version_0/checkpoints"
    folder.mkdir(parents=True)
    for step in (5, 10):
        path, content = folder / f"step={step}.ckpt", bytes(100 + step)
        path.write_bytes(content)
        Manifest(step, len(content), sha256_bytes(content), {"train": {"done": 1}}, {"val/loss": 2.5}).write(path)
    assert files.newest_whole(tmp_path) == 10
    manifest = folder / "step=10.manifest.json"
    content = manifest.read_bytes()
    for place in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        manifest.write_bytes(damaged)
        assert files.newest_whole(tmp_path) == 5, bytes(damaged)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["short", pytest.param("long", marks=EXHAUSTIVE)])
def test_every_kind_of_fault_strikes(which: str) -> None:
    ended = program("", "--tour", which)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 0 | 0 | 0 | " in next(line for line in ended.stdout.splitlines() if line.startswith("| all "))
    assert "; 0 more were planted" in ended.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_mutant_turns_it_red() -> None:
    ended = program(".mutants")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sum(" injections, " in line for line in ended.stdout.splitlines()) == len(MUTANTS) >= 8
