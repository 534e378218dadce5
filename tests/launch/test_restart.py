"""Preempted and killed runs go on by the same command line, on disks and on what stands for a mounted bucket."""

import errno
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.checkpoints.choice import last_checkpoint, stored
from tests.recipe import Muse, start

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

STEPS = 36
EVERY_3 = ("--trainer.val_check_interval=3", "--trainer.limit_val_batches=1", "--trainer.check_val_every_n_epoch=null")


@pytest.fixture
def muse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Muse:
    monkeypatch.chdir(tmp_path)
    muse = Muse(tmp_path, capsys)
    assert muse.with_recipe("prepare")[0] == 0
    return muse


def refuse_in(root: Path, real: Callable[..., Any], code: int) -> Callable[..., Any]:
    """A call of `os` that fails for paths in a folder, as the storage that is mounted there would have it."""

    def call(*paths: Any, **options: Any) -> Any:
        if any(Path(os.fsdecode(path)).resolve().is_relative_to(root) for path in paths if not isinstance(path, int)):
            raise OSError(code, os.strerror(code))
        return real(*paths, **options)

    return call


def command(name: str) -> list[str]:
    flags = (f"--run.name={name}", f"--trainer.max_steps={STEPS}", *EVERY_3, "--resume")
    return ["fit", "--config=recipe.yaml", *flags]


def signalled(name: str, number: signal.Signals, after: int) -> tuple[int | None, str]:
    """Exit code and log of a start that gets a signal when it has saved so many steps."""
    log, folder = Path(f"{number.name}.log"), Path("runs") / name / "version_0" / "checkpoints"
    run = start(command(name), log)
    assert run.pid is not None
    deadline = time.monotonic() + 120
    while not (folder.exists() and any(step >= after for step, _ in stored(folder))):
        assert run.is_alive(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.kill(run.pid, number)
    run.join(120)
    return run.exitcode, log.read_text()


def losses(name: str) -> dict[str, dict[int, float]]:
    """What all starts of a run have logged, the last word of each step."""
    said: dict[str, dict[int, float]] = {"train/loss": {}, "val/loss": {}}
    for path in sorted(Path("runs", name, "version_0").glob("events.out.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in said.keys() & events.Tags()["scalars"]:
            said[tag] |= {event.step: event.value for event in events.Scalars(tag)}
    return said


@pytest.mark.parametrize(
    "cannot",
    [
        pytest.param((), marks=pytest.mark.exhaustive),
        pytest.param((errno.EXDEV, errno.EPERM), marks=pytest.mark.exhaustive),
        (errno.ENOSYS, errno.ENOSYS),
    ],
    ids=str,
)
def test_the_same_command_line_until_it_is_done(
    muse: Muse, cannot: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cannot`: what renames and links fail with in the folder of the runs."""
    whole, *_ = muse("fit", "--config=recipe.yaml", "--run.name=whole", f"--trainer.max_steps={STEPS}", *EVERY_3)
    assert whole == 0
    if cannot:
        for names, code in ((("rename", "replace"), cannot[0]), (("link", "symlink"), cannot[1])):
            for name in names:
                monkeypatch.setattr(os, name, refuse_in(muse.folder / "runs", getattr(os, name), code))
    code, said = signalled("often", signal.SIGTERM, after=3)
    assert code == 75, said
    assert "; --resume goes on" in said
    code, said = signalled("often", signal.SIGKILL, after=15)
    assert code == -signal.SIGKILL, said
    assert "resume: from runs/often/version_0/checkpoints/step=" in said
    code, _, err = muse(*command("often"))
    assert code == 0, err
    found, expected = losses("often"), losses("whole")
    assert len(expected["train/loss"]) == STEPS
    assert found["train/loss"] == expected["train/loss"]
    # Validations that the signals have cut short are not repeated.
    assert found["val/loss"].items() <= expected["val/loss"].items()
    assert len(found["val/loss"]) >= STEPS // 3 - 2
    last = last_checkpoint(Path("runs/often/version_0/checkpoints"))
    assert last is not None
    assert last.stem == f"step={STEPS}"
    assert not [path for path in Path("runs").rglob("*") if path.is_symlink()]
    code, _, err = muse(*command("often"))
    assert (code, "nothing is left to train" in err) == (0, True), err
