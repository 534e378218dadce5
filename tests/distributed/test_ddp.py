"""Two processes, each with half of the batches, against one process that accumulates them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def train(folder, devices, accumulate, optimizer):
    folder.mkdir()
    # Lightning starts the second process by running the script again.
    command = [
        sys.executable,
        "-m",
        "tests.distributed.train_tiny",
        str(folder),
        str(devices),
        str(accumulate),
        optimizer,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "result.pt")


@pytest.mark.multi_process
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_equal_accumulation(tmp_path, optimizer):
    two = train(tmp_path / "two", devices=2, accumulate=1, optimizer=optimizer)
    one = train(tmp_path / "one", devices=1, accumulate=2, optimizer=optimizer)

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
