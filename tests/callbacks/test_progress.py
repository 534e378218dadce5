"""Progress in a log file: lines, not a bar."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from muse_lightning.callbacks.progress import ProgressLines, progress_bar
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer


def test_a_line_for_the_first_and_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(
        tmp_path, enable_progress_bar=True, max_steps=4, callbacks=[ProgressLines(interval_seconds=1000)]
    )
    trainer.fit(tiny_model(), datamodule=TinyData(batches(4), batches(1)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    training = [line for line in lines if "train/loss" in line]
    assert training[0].startswith("step 1/4  train/loss ")
    assert "left 0:00:0" in training[0]
    final = float(trainer.callback_metrics["train/loss"])
    assert training[-1] == f"step 4/4  train/loss {final:.4f}"
    assert len(training) == 2
    assert any("val/loss " in line and "val/ppl " in line for line in lines)


def test_no_interval_is_a_line_per_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(
        tmp_path, enable_progress_bar=True, max_steps=3, callbacks=[ProgressLines(interval_seconds=0)]
    )
    trainer.fit(tiny_model(), datamodule=TinyData(batches(3)))
    steps = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "train/loss" in line]
    assert steps == ["step 1/3", "step 2/3", "step 3/3"]


def test_other_ranks_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines()
    lines.disable()
    tiny_trainer(tmp_path, enable_progress_bar=True, max_steps=1, callbacks=[lines]).fit(
        tiny_model(), datamodule=TinyData(batches(1))
    )
    assert "step" not in capsys.readouterr().out


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress_bar(), ProgressLines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(progress_bar(), RichProgressBar)
