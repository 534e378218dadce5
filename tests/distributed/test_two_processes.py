"""Two processes, each with half of the batches, against one process that accumulates them; shards against replicas."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def train(folder: Path, devices: int, accumulate: int, *ways: str) -> dict[str, Any]:
    """What came of each way, STRATEGY/OPTIMIZER, in one start of the processes."""
    # Lightning starts the second process by running the script again.
    script = ["tests.distributed.train_tiny", str(folder), str(devices), str(accumulate)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", *script, *ways]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {way: torch.load(folder / way / "result.pt") for way in ways}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ways = ("ddp/adamw", "ddp/muon", "sharded/adamw", "sharded-recompute/adamw")
    return train(tmp_path_factory.mktemp("two"), 2, 1, *ways)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("one"), 1, 2, "auto/adamw", "auto/muon")


@pytest.mark.multi_process
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_equal_accumulation(optimizer: str, two: dict[str, Any], one: dict[str, Any]) -> None:
    one, two = one[f"auto/{optimizer}"], two[f"ddp/{optimizer}"]
    assert len(one["logged"]["train/loss"]) == 4
    assert len(one["logged"]["val/loss"]) == 1
    assert [length for _, length in one["logged"]["train/context"]] == [12.0, 24.0, 48.0, 48.0]
    for tag, points in one["logged"].items():
        steps, values = zip(*points, strict=True)
        found_steps, found = zip(*two["logged"][tag], strict=True)
        assert found_steps == steps
        # The same sums in another order: float32 rounding, 6e-8, grown by four steps of an optimizer that divides each
        # gradient by its own size, so that a gradient near 0 turns rounding into a step.
        assert found == pytest.approx(values, rel=1e-4), tag
    # 1e-3 is a tenth of one step of the learning rate, 1e-2; without averaging over ranks they differ by several steps.
    torch.testing.assert_close(two["parameters"], one["parameters"], atol=1e-3, rtol=0)


@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", ["sharded", "sharded-recompute"])
def test_shards_equal_replicas(strategy: str, two: dict[str, Any]) -> None:
    """From the same first weights to the same last ones: initialisation, gathering, gradients, clipping."""
    sharded, replicas = two[f"{strategy}/adamw"], two["ddp/adamw"]
    for tag, points in replicas["logged"].items():
        assert sharded["logged"][tag] == [(step, pytest.approx(value, rel=1e-5)) for step, value in points], tag
    # By weights that are gathered for it.
    assert replicas["errors"][-1].min() > 0
    torch.testing.assert_close(sharded["errors"], replicas["errors"], rtol=1e-3, atol=1e-9)
    # Rounding again, as above; one step of the learning rate is 1e-2.
    torch.testing.assert_close(sharded["parameters"], replicas["parameters"], atol=1e-4, rtol=0)
