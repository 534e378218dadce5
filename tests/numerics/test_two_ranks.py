"""A step that is bad on one rank is skipped on both; with parameters whole, and in parts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.numerics.test_skipping import assert_same
from tests.numerics.two_ranks import PLANTS, STEPS

ROOT = Path(__file__).parents[2]


def train(folder: Path, strategy: str) -> list[list[Any]]:
    """What each rank has left, of the training with bad steps and of the one that is verified."""
    command = [sys.executable, "-m", "tests.numerics.two_ranks", str(folder), strategy]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [
        [torch.load(folder / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in ("bad", "verified")
    ]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_ranks(tmp_path: Path, strategy: str) -> None:
    ranks, verified = train(tmp_path, strategy)
    assert_same(ranks[0]["states"], ranks[1]["states"])
    states = ranks[0]["states"]
    assert len(states) == STEPS
    for step in range(2, STEPS + 1):
        weight = "llama.model.norm.weight"
        if step in PLANTS:
            assert_same([states[step - 1]], [states[step - 2]])
        else:
            assert not torch.equal(states[step - 1][weight], states[step - 2][weight]), step
    assert all(tensor.isfinite().all() for tensor in states[-1].values())
    assert [rank["counters"] for rank in ranks] == [{"consecutive_skipped_steps": 0, "skipped_steps": 3}] * 2

    # Sums over ranks too are the same twice, and what is computed twice is trained on as if it were computed once.
    before = min(PLANTS) - 1
    assert_same(verified[0]["states"][:before], states[:before])
    assert verified[1]["counters"]["skipped_steps"] == 0
