"""tools/check_loss.py: accepts a run whose loss fell, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

TOOL = Path(__file__).parents[2] / "tools" / "check_loss.py"


def write_events(folder: Path, losses: list[float]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate(losses):
            writer.add_scalar("train/loss", loss, step)


def check(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_falling_loss_is_accepted(tmp_path: Path) -> None:
    write_events(tmp_path / "demo" / "version_0", [5.0, 5.5, 4.25])
    code, output = check(tmp_path)
    assert code == 0
    assert "train/loss: 5.0000 at first, 4.2500 at last, 3 values" in output


@pytest.mark.parametrize(
    "losses", [[4.0, 5.0], [4.0, 4.0], [4.0], [5.0, float("nan")], [5.0, float("nan"), 4.0]], ids=str
)
def test_a_loss_that_did_not_fall_is_refused(tmp_path: Path, losses: list[float]) -> None:
    write_events(tmp_path, losses)
    code, output = check(tmp_path)
    assert code == 1
    assert "train/loss did not fall" in output


def test_the_right_run_must_be_named(tmp_path: Path) -> None:
    assert "found 0 folders" in check(tmp_path)[1]
    write_events(tmp_path / "version_0", [5.0, 4.0])
    code, output = check(tmp_path, "--tag", "val/loss")
    assert code == 1
    assert "no tag val/loss, only train/loss" in output
    write_events(tmp_path / "version_1", [5.0, 4.0])
    assert "found 2 folders" in check(tmp_path)[1]
