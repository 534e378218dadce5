"""Two processes, each with half of the batches, against one process that accumulates them; shards against replicas."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def train(folder: Path, devices: int, accumulate: int, strategy: str, optimizer: str = "adamw") -> Any:
    folder.mkdir()
    # Lightning starts the second process by running the script again.
    command = [
        sys.executable,
        "-m",
        "tests.distributed.train_tiny",
        str(folder),
        str(devices),
        str(accumulate),
        strategy,
        optimizer,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "result.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("ddp") / "two", devices=2, accumulate=1, strategy="ddp")


@pytest.mark.multi_process
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_equal_accumulation(optimizer: str, two: Any, tmp_path: Path) -> None:
    if optimizer != "adamw":
        two = train(tmp_path / "two", devices=2, accumulate=1, strategy="ddp", optimizer=optimizer)
    one = train(tmp_path / "one", devices=1, accumulate=2, strategy="auto", optimizer=optimizer)

    assert len(one["logged"]["train/loss"]) == 4
    assert len(one["logged"]["val/loss"]) == 1
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
def test_shards_equal_replicas(strategy: str, two: Any, tmp_path: Path) -> None:
    """From the same first weights to the same last ones: initialisation, gathering, gradients, clipping."""
    sharded = train(tmp_path / "sharded", devices=2, accumulate=1, strategy=strategy)
    for tag, points in two["logged"].items():
        assert sharded["logged"][tag] == [(step, pytest.approx(value, rel=1e-5)) for step, value in points], tag
    # Rounding again, as above; one step of the learning rate is 1e-2.
    torch.testing.assert_close(sharded["parameters"], two["parameters"], atol=1e-4, rtol=0)
