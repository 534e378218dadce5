"""tools/slim_events.py: all scalars, at their steps and times, and nothing else."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from tools.slim_events import main


def read(folder: Path) -> tuple[dict[str, list[tuple[float, int, float]]], list[str]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(e.wall_time, e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, [*tags["images"], *tags["tensors"], *tags["histograms"]]


def test_scalars_alone_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "mine" / "version_3"
    for restart in range(2):
        with SummaryWriter(str(run), filename_suffix=f".{restart}") as writer:
            for step in range(3):
                writer.add_scalar("train/loss", 3.0 - step - restart, step + 10 * restart)
            writer.add_image("picture", torch.rand(3, 64, 64), 2)
            writer.add_text("config", "words " * 1000, 0)
            writer.add_histogram("weights", torch.rand(1000), 1)
    assert len(list(run.iterdir())) == 2
    assert main([str(run), str(tmp_path / "out")]) == 0
    expected, others = read(run)
    assert len(expected["train/loss"]) == 6
    assert len(others) == 3
    assert read(tmp_path / "out" / "mine") == (expected, [])
    small, large = (
        sum(file.stat().st_size for file in folder.iterdir()) for folder in (tmp_path / "out" / "mine", run)
    )
    assert small < large / 10
    assert "6 scalars" in capsys.readouterr().out
    # Once more from what was written.
    assert main([str(tmp_path / "out" / "mine"), str(tmp_path / "again")]) == 0
    assert read(tmp_path / "again" / "mine") == (expected, [])


def test_a_folder_without_event_files_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "has no event files" in capsys.readouterr().err


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not what is read, and not one version of a run by another."""
    runs = [tmp_path / "mine" / f"version_{number}" for number in range(2)]
    for run in runs:
        with SummaryWriter(str(run)) as writer:
            writer.add_scalar("train/loss", 3.0, 1)
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main([*map(str, runs), str(out)])
    assert f"{runs[1]}: would be written to {out}/mine, which another has" in capsys.readouterr().err
    assert not out.exists()
    assert main([str(runs[0]), str(out)]) == 0
    kept = read(out / "mine")
    with pytest.raises(SystemExit):
        main([str(out / "mine"), str(out)])
    assert f"{out}/mine: would be written to {out}/mine, which exists" in capsys.readouterr().err
    assert read(out / "mine") == kept
    assert len(kept[0]["train/loss"]) == 1


def test_a_run_is_named_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SummaryWriter(str(tmp_path / "mine" / "version_0")) as writer:
        writer.add_scalar("train/loss", 3.0, 1)
    monkeypatch.chdir(tmp_path / "mine" / "version_0")
    assert main([".", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "mine").is_dir()
