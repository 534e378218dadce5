"""tools/training_results.py: what it reads, compares, refuses and writes, of event files with known values."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from tools import training_results as under_test

LOSSES = {"dense": [5.0, 4.0, 3.0], "muse": [4.5, 3.5, 2.7]}
STEPS = (10, 20, 30)
TRAIN_LOSSES = {"dense": [6.0, 5.0, 4.0, 3.5], "muse": [9.0, 9.0, 4.2, 3.8]}


def write_run(folder: Path, name: str, tokens: float = 3e6, seconds_per_step: float = 1.0, **environment: Any) -> Path:
    """A run of thirty steps, a second each unless told; MuSe's own loss is 0.1 over its exact one."""
    folder.mkdir()
    with SummaryWriter(str(folder)) as writer:
        for step, loss in zip(STEPS, LOSSES[name], strict=True):
            scalars = {"val/loss_exact": loss, "val/loss": loss + 0.1, "val/loss_by_position/1": loss + 3.0}
            scalars |= {"train/tokens": tokens * step / 30, "throughput/device/tokens_per_sec": 1000.0 * step}
            scalars |= {"muse/relative_error": step / 1000} if name == "muse" else {}
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step, walltime=1000.0 + (step - 10) * seconds_per_step)
        for step, loss in enumerate(TRAIN_LOSSES[name]):
            writer.add_scalar("train/loss", loss, step, walltime=1000.0 + step)
    recorded = {"seed": 1, "devices": ["GPU"], "data": [{"name": "d", "fingerprint": "ab"}], **environment}
    (folder / "environment.json").write_text(json.dumps(recorded))
    (folder / "config.yaml").write_text(f"model: {{attention: {{class_path: {name}}}}}\n")
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> str:
    return f"Dense={write_run(tmp_path / 'dense', 'dense')}"


def muse(tmp_path: Path, **changes: Any) -> str:
    return f"MuSe={write_run(tmp_path / 'muse', 'muse', **changes)}"


def test_the_table(tmp_path: Path, dense: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert under_test.main([str(tmp_path / "new" / "out"), dense, muse(tmp_path)]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["Dense", "1", "3.0000", "+0.00%", "-", "3.1000", "-", "-", "-", "20,000", "20", "3.0000", "20"]
    # It is as good as the first's end at its third validation, after 20 seconds.
    # Of the last two training losses it was 0.2 and 0.3 higher.
    assert rows[3][:5] == ["MuSe", "1", "2.7000", "-10.00%", "+0.2500 ± 0.0500"]
    assert rows[3][5:] == ["2.8000", "-", "-", "-", "20,000", "20", "3.0000", "20"]
    assert len(rows[0]) == len(rows[1]) == len(rows[2]) == len(rows[3])


def test_pauses_of_a_resumed_run_do_not_count(tmp_path: Path) -> None:
    """Four starts: of the first, two steps are lost; the second one's are all lost; the third logs only that it is
    there; the fourth is a pause, a startup and a first step later."""
    run = tmp_path / "dense"
    run.mkdir()
    starts = [
        (None, {1: 1000.0, 2: 1010.0, 3: 1020.0, 4: 1030.0, 5: 1040.0}),
        (4, {5: 5000.0, 6: 5010.0}),
        (4, {}),
        (4, {4: 9000.0, 5: 9010.0, 6: 9020.0}),
    ]
    for number, (purge_step, times) in enumerate(starts):
        with SummaryWriter(str(run), purge_step=purge_step, filename_suffix=f".{number}") as writer:
            writer.add_text("run/environment", "it", 0)
            for step, time in times.items():
                writer.add_scalar("val/loss", 7.0 - step, step, walltime=time)
                writer.add_scalar("train/tokens", step, step, walltime=time + 1)
    (run / "environment.json").write_text(json.dumps({"seed": 1, "devices": ["GPU"], "data": [{"fingerprint": "ab"}]}))
    (run / "config.yaml").write_text("model: {attention: Dense}\n")
    read = under_test.read_run("Dense", run)
    # 21 seconds from the first loss to the tokens of step 3.
    expected = [(1, 0.0), (2, 10.0), (3, 20.0), (4, 21.0), (5, 31.0), (6, 41.0)]
    assert [(point.step, point.seconds) for point in read.scalars["val/loss"]] == expected
    assert [point.seconds for point in read.scalars["train/tokens"]] == [seconds + 1 for _, seconds in expected]


@pytest.mark.parametrize(
    ("changes", "loss_by_then", "paired"),
    [
        ({"seconds_per_step": 0.75}, "3.5000", "+0.2500 ± 0.0500"),
        ({"seconds_per_step": 2.0}, "-", "+0.2500 ± 0.0500"),
        ({"seed": 2}, "3.0000", "-"),
        ({"devices": ["other"]}, "-", "+0.2500 ± 0.0500"),
    ],
)
def test_what_is_compared_with_the_first(
    tmp_path: Path, dense: str, changes: dict[str, Any], loss_by_then: str, paired: str, capsys: Any
) -> None:
    """The first was at 4.0 after 10 seconds and at 3.0 after 20; batches are the same where seeds are."""
    under_test.main([str(tmp_path / "out"), dense, muse(tmp_path, **changes)])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[3].strip("|").split("|")]
    assert (cells[11], cells[4]) == (loss_by_then, paired)


def test_times_of_another_device_are_not_compared(
    tmp_path: Path, dense: str, capsys: pytest.CaptureFixture[str]
) -> None:
    under_test.main([str(tmp_path / "out"), dense, muse(tmp_path, devices=["other"])])
    assert capsys.readouterr().out.splitlines()[3].endswith("| another device | - | - |")


def test_raw_data_and_plots(tmp_path: Path, dense: str) -> None:
    under_test.main([str(tmp_path / "out"), dense, muse(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["attention"]["class_path"] for r in records if r["record"] == "run"] == ["dense", "muse"]
    points = {(r["name"], r["tag"]): r["points"] for r in records if r["record"] == "scalar"}
    assert points["MuSe", "val/loss_exact"] == [[10, 0.0, 4.5], [20, 10.0, 3.5], [30, 20.0, 2.7]]
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_evaluations_are_a_table_of_their_own(tmp_path: Path, dense: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert under_test.main([str(tmp_path / "out"), dense, "--evaluated", muse(tmp_path, tokens=1)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["| `val/loss` | 2.8000 |", "| `val/loss_exact` | 2.7000 |"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"fingerprint": "cd"}]}, r"MuSe: trained on dataset \['cd'\], Dense on \['ab'\]"),
        ({"tokens": 2e6}, "MuSe: saw 2,000,000 tokens, Dense 3,000,000"),
    ],
    ids=["dataset", "tokens"],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, dense: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        under_test.main([str(tmp_path / "out"), dense, muse(tmp_path, **changes)])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_validation_among_the_trainings_is_refused(tmp_path: Path, dense: str) -> None:
    folder = tmp_path / "validated"
    folder.mkdir()
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("val/loss", 3.0, 0)
    for name in ("environment.json", "config.yaml"):
        (folder / name).write_text((tmp_path / "dense" / name).read_text())
    with pytest.raises(SystemExit, match="MuSe: has no train/tokens; give a fit here, validations after --evaluated"):
        under_test.main([str(tmp_path / "out"), dense, f"MuSe={folder}"])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("missing", "message"), [("environment.json", "has no environment.json"), ("events*", "no scal")]
)
def test_what_is_no_run_is_refused(tmp_path: Path, dense: str, missing: str, message: str) -> None:
    (path,) = (tmp_path / "dense").glob(missing)
    path.unlink()
    with pytest.raises(SystemExit, match=message):
        under_test.main([str(tmp_path / "out"), dense])
