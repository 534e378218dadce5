"""Training that is killed and resumed reads exactly the batches of one that is not: by the hashes in the ledgers."""

import os
import pickle
import signal
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.checkpoints.choice import last_checkpoint
from muse_lightning.data.ledger import LedgerBatch, ledger_files, read_ledger
from tests.recipe import Muse, start
from tests.resumed import assert_same_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

OFTEN = ("--trainer.val_check_interval=3", "--trainer.limit_val_batches=1", "--trainer.check_val_every_n_epoch=null")


@pytest.fixture
def muse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Muse:
    monkeypatch.chdir(tmp_path)
    return Muse(tmp_path, capsys)


def kill_after(steps: int, version: int, *flags: str) -> Path:
    """Start a fit, kill all its processes a while after it has saved a checkpoint of so many steps or more, and return
    the last checkpoint that it left."""
    command = ["fit", "--config=recipe.yaml", "--trainer.max_steps=1000000", *OFTEN, *flags]
    log = Path(f"log{version}")
    run = start(command, log)
    assert run.pid is not None
    folder = Path(f"runs/tiny/version_{version}/checkpoints")
    try:
        deadline = time.monotonic() + 120
        while not any(step >= steps for step, _ in saved(folder)):
            assert run.is_alive(), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        time.sleep(0.3)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.join()
    return next(path for _, path in sorted(saved(folder), reverse=True) if is_whole(path))


def saved(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("step=*.ckpt"):
        yield int(path.stem.removeprefix("step=")), path


def is_whole(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile):
        return False
    return True


def batches(version: int) -> list[tuple[list[str], list[list[int]]]]:
    """What all ranks of a run have read: hashes and blocks of each batch, by its number."""
    by_number: dict[int, tuple[list[str], list[list[int]]]] = defaultdict(lambda: ([], []))
    for _, path in sorted(ledger_files(Path(f"runs/tiny/version_{version}/ledger")).items()):
        for entry in read_ledger(path):
            if isinstance(entry, LedgerBatch):
                by_number[entry.batch][0].append(entry.hash)
                by_number[entry.batch][1].extend(entry.blocks)
    assert sorted(by_number) == list(range(len(by_number)))
    return [by_number[number] for number in range(len(by_number))]


def audit(muse: Muse, version: int) -> str:
    code, out, err = muse("data", "audit", f"runs/tiny/version_{version}")
    assert code == 0, err
    return out


def test_one_process_killed_twice(muse: Muse) -> None:
    assert muse.with_recipe("prepare")[0] == 0
    first = kill_after(4, 0, "--data.num_workers=2")
    second = kill_after(20, 1, "--data.num_workers=0", f"--ckpt_path={first}")
    steps = int(second.stem.removeprefix("step=")) + 10
    code, _, err = muse.with_recipe(
        "fit", f"--trainer.max_steps={steps}", "--data.num_workers=1", f"--ckpt_path={second}", *OFTEN
    )
    assert code == 0, err
    code, _, err = muse.with_recipe("fit", f"--trainer.max_steps={steps}", *OFTEN)
    assert code == 0, err
    whole = batches(3)
    assert batches(2) == whole
    assert len(whole) == steps
    out = audit(muse, 2)
    assert "dataset 2: " in out, "no second epoch"
    assert out.endswith("problems: 0\n")


def test_two_processes_killed_then_two_and_one(muse: Muse) -> None:
    assert muse.with_recipe("prepare")[0] == 0
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1")
    checkpoint = kill_after(4, 0, *ranks)
    steps = int(checkpoint.stem.removeprefix("step="))
    more = (f"--trainer.max_steps={steps + 10}", f"--ckpt_path={checkpoint}")
    resumed = start(["fit", "--config=recipe.yaml", *OFTEN, *ranks, *more], Path("log"))
    resumed.join(240)
    assert resumed.exitcode == 0, Path("log").read_text()
    flags = (f"--trainer.max_steps={steps + 10}", "--data.batch_size=2", *OFTEN)
    assert muse.with_recipe("fit", *flags)[0] == 0
    # Two ranks of one block each read what one rank of two blocks reads.
    two, one = batches(1), batches(2)
    assert [blocks for _, blocks in two] == [blocks for _, blocks in one]
    assert len(two) == steps + 10
    # And one rank goes on where two were: nothing is read again in an epoch, nothing is left out.
    assert muse.with_recipe("fit", *flags, f"--ckpt_path={checkpoint}")[0] == 0
    assert [blocks for _, blocks in batches(3)] == [blocks for _, blocks in one]
    for version in (1, 3):
        audit(muse, version)


SAVES = ("--trainer.callbacks+=DurableCheckpoint", "--trainer.callbacks.every_n_steps=5")


def logged(folder: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


@pytest.mark.parametrize(
    "is_asynchronous",
    [pytest.param("true", id="asynchronous"), pytest.param("false", id="synchronous", marks=pytest.mark.exhaustive)],
)
def test_killed_three_times_in_one_folder(muse: Muse, is_asynchronous: str) -> None:
    """The same command line each time; every step is trained as by a run that nobody kills, and logged once."""
    assert muse.with_recipe("prepare")[0] == 0
    flags = ("--trainer.max_steps=60", *SAVES, f"--trainer.callbacks.is_asynchronous={is_asynchronous}")
    for steps in (6, 18, 30):
        kill_after(steps, 0, *flags, "--resume")
    code, _, err = muse.with_recipe("fit", *flags, *OFTEN, "--resume")
    assert code == 0, err
    assert muse.versions() == ["runs/tiny/version_0"]
    assert muse.with_recipe("fit", *flags, *OFTEN)[0] == 0
    assert batches(0) == batches(1)
    found, wanted = (logged(Path(f"runs/tiny/version_{version}")) for version in (0, 1))
    assert [step for step, _ in found] == list(range(60))
    assert found == wanted
    assert len(list(Path("runs/tiny/version_0").glob("config.step=*.yaml"))) == 3
    assert audit(muse, 0).endswith("problems: 0\n")
    assert_same_checkpoints(*(Path(f"runs/tiny/version_{n}/checkpoints/step=60.ckpt") for n in (0, 1)))


def test_two_processes_of_which_the_first_is_told_to_stop(muse: Muse) -> None:
    """Both save the same step and stop; the same command goes on, and is the run that nobody stopped."""
    assert muse.with_recipe("prepare")[0] == 0
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1", "--trainer.max_steps=2000", *SAVES)
    # A learning rate that does not depend on where the training is to end.
    constant = ("--model.schedule=wsd", "--model.decay_fraction=0")
    command = ["fit", "--config=recipe.yaml", *ranks, *constant, "--resume"]
    run = start(command, Path("log"))
    assert run.pid is not None
    folder = Path("runs/tiny/version_0/checkpoints")
    deadline = time.monotonic() + 240
    while not any(step >= 10 for step, _ in saved(folder)):
        assert run.is_alive(), Path("log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGTERM)
    run.join(120)
    log = Path("log").read_text()
    assert run.exitcode == 75, log
    assert "error: " not in log
    (line,) = [line for line in log.splitlines() if line.startswith("preempted at step ")]
    stopped = int(line.split()[3].rstrip(","))
    assert last_checkpoint(folder) == folder / f"step={stopped}.ckpt"
    assert len(logged(Path("runs/tiny/version_0"))) == stopped
    more = [flag.replace("max_steps=2000", f"max_steps={stopped + 10}") for flag in command]
    resumed = start(more, Path("log"))
    resumed.join(240)
    assert resumed.exitcode == 0, Path("log").read_text()
    whole = start([flag for flag in more if flag != "--resume"], Path("log"))
    whole.join(240)
    assert whole.exitcode == 0, Path("log").read_text()
    assert batches(0) == batches(1)
    assert len(logged(Path("runs/tiny/version_0"))) == stopped + 10
    ends = [Path(f"runs/tiny/version_{version}/checkpoints/step={stopped + 10}.ckpt") for version in (0, 1)]
    assert_same_checkpoints(*ends)
    saved_hashes = torch.load(ends[0], weights_only=True)["batch_hashes"]
    assert sorted(saved_hashes) == [0, 1]


def test_shards_resumed_in_place(muse: Muse) -> None:
    """Two processes with a part of every parameter each: what goes on from the middle ends where the whole run did."""
    command = [
        "fit",
        "--config=recipe.yaml",
        "--trainer.devices=2",
        "--trainer.strategy=sharded",
        "--trainer.max_steps=6",
        *OFTEN,
    ]
    folder = Path("runs/tiny/version_0/checkpoints")
    states = []
    for flags in ([], ["--resume"]):
        run = start([*command, *flags], Path("log"))
        run.join()
        assert run.exitcode == 0, Path("log").read_text()
        states.append(torch.load(folder / "step=6.ckpt", weights_only=True))
        for path in folder.glob("step=6.*"):
            path.unlink()
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(states[1][key], states[0][key], rtol=0, atol=0)
