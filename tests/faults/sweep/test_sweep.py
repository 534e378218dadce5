"""The short version of `python -m tests.faults.sweep`: all calls of one save. Where strace may not trace,
tests/checkpoints/test_kills.py still kills a save at each of its steps, inside of Python."""

from pathlib import Path

import pytest

from tests.faults.sweep.mutants import MUTANTS, no_fsync_of_folders, saves_not_awaited, verdict, written_in_place
from tests.faults.sweep.runs import DAMAGES, KILL, Scene
from tests.faults.sweep.sweeping import Outcome, sweep
from tests.faults.sweep.tracing import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no system call can be failed here: {why_not()}")
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
ONE_SAVE = "step=2"
CALLS = 20
"""That change something, for one checkpoint and its manifest, which is written twice: at least."""
FAST = (no_fsync_of_folders, written_in_place, saves_not_awaited)


def broken(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.problems]


@pytest.mark.parametrize(("is_asynchronous", "kind"), [(True, KILL), (False, "ENOSPC")], ids=["kill", "disk full"])
def test_every_call_of_a_save(tmp_path: Path, is_asynchronous: bool, kind: str) -> None:
    scene = Scene(tmp_path, is_asynchronous)
    outcomes = list(sweep(scene, with_reads=False, kinds={kind}, files=ONE_SAVE, with_damage=False))
    assert not broken(outcomes)
    assert {outcome.call for outcome in outcomes} == {"", "openat to write", "write", "fsync", "rename"}
    assert len(outcomes) > CALLS


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    outcomes = list(sweep(Scene(tmp_path, is_asynchronous=True), kinds={"none of them"}))
    assert not broken(outcomes)
    assert len(outcomes) == 2 * len(DAMAGES) + 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if mutant in FAST else EXHAUSTIVE) for name, mutant in MUTANTS.items()]
)
def test_broken_code_is_found(name: str) -> None:
    assert verdict(name) is not None
