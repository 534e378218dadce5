"""Every kind of random fault once; mistakes in the code that the campaign must find; a seed is one plan."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.campaign.faults import KINDS
from tests.faults.campaign.mutants import MUTANTS
from tests.faults.campaign.report import table
from tests.faults.campaign.run import FEWEST_FAULTS, Record, make_plan, tour

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.multi_process


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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_every_kind_of_fault_strikes(which: str) -> None:
    ended = program("", "--tour", which)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 0 | 0 | 0 | " in next(line for line in ended.stdout.splitlines() if line.startswith("| all "))
    assert "; 0 more were planted" in ended.stdout


@pytest.mark.slow
def test_every_mutant_turns_it_red() -> None:
    ended = program(".mutants")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sum(" injections, " in line for line in ended.stdout.splitlines()) == len(MUTANTS) >= 8
