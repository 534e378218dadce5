"""`muse fit --resume`, `--ckpt_path last | best | PATH`, signals and exit codes, on a run small enough for a test."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.checkpoints import lock
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.checkpoints.lock import FolderLock
from muse_lightning.checkpoints.manifest import Manifest, manifest_path
from muse_lightning.data.datamodule import TokenDataModule
from muse_lightning.data.ledger import LedgerBatch, read_ledger
from muse_lightning.training.module import LanguageModel
from tests.checkpoints.folder import steps
from tests.recipe import Muse

RUN = Path("runs/tiny/version_0")
EVERY_STEP = (
    "--trainer.callbacks+=DurableCheckpoint",
    "--trainer.callbacks.every_n_steps=1",
    "--trainer.callbacks.keep_last=9",
    "--trainer.callbacks.is_asynchronous=false",
)


@pytest.fixture
def muse(muse_with_dataset: Muse) -> Muse:
    return muse_with_dataset


def ok(result: tuple[int, str, str]) -> str:
    """Standard error of a command that must have succeeded."""
    assert result[0] == 0, result[2]
    return result[2]


def checkpoint(step: int, run: Path = RUN) -> Path:
    return run / "checkpoints" / f"step={step}.ckpt"


def losses(run: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(run)).Reload().Scalars("train/loss")]


def hashes(run: Path) -> list[str]:
    return [entry.hash for entry in read_ledger(run / "ledger" / "rank0.jsonl") if isinstance(entry, LedgerBatch)]


def sends(monkeypatch: pytest.MonkeyPatch, number: int, at_step: int) -> None:
    """A signal comes in the middle of a step."""
    step = LanguageModel.training_step

    def training_step(model: LanguageModel, batch: Any, batch_idx: int) -> Any:
        if model.trainer.global_step == at_step:
            os.kill(os.getpid(), number)
        return step(model, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", training_step)


def test_preempted_twice_it_is_the_run_that_was_not(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command line again and again: losses, batches and weights, each step once, in one folder."""
    flags = ("--trainer.max_steps=7", "--run.name=whole")
    ok(muse.with_recipe("fit", *flags))
    again = ("fit", "--trainer.max_steps=7", "--resume")
    for at_step, saved in ((1, 2), (4, 5)):
        with monkeypatch.context() as patch:
            sends(patch, signal.SIGTERM, at_step)
            code, _, err = muse.with_recipe(*again)
        assert code == 75, err
        line = f"preempted at step {saved}, saved as {checkpoint(saved)}; --resume goes on"
        assert err.splitlines()[-1] == line
    err = ok(muse.with_recipe(*again))
    assert f"resume: from {RUN}/checkpoints/step=5.ckpt\n" in err
    assert muse.versions() == ["runs/tiny/version_0", "runs/whole/version_0"]
    whole = Path("runs/whole/version_0")
    assert [step for step, _ in losses(RUN)] == list(range(7))
    assert losses(RUN) == losses(whole)
    assert hashes(RUN) == hashes(whole)
    # Their content apart from what says when and where.
    assert Manifest.read(checkpoint(7)).data == Manifest.read(checkpoint(7, whole)).data
    for number in (2, 5):
        assert (RUN / f"config.step={number}.yaml").is_file()
        assert (RUN / f"environment.step={number}.json").is_file()
    # Nothing is left to do: who repeats the command until it succeeds has come to the end.
    before = muse._contents()
    err = ok(muse.with_recipe(*again))
    assert f"resume: {RUN} is at step 7, trainer.max_steps is 7: nothing is left to train\n" in err
    assert {name for name, content in muse._contents().items() if before.get(name, b"new") != content} <= {
        muse.folder / RUN / "lock"
    }


def test_checkpoints_are_where_resume_looks_whatever_the_logger(muse: Muse) -> None:
    flags = ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere", *EVERY_STEP)
    ok(muse.with_recipe("fit", "--trainer.max_steps=1", *flags))
    err = ok(muse.with_recipe("fit", "--trainer.max_steps=2", "--resume", *flags))
    assert f"resume: from {checkpoint(1)}\n" in err


def test_with_nothing_to_resume_a_new_run_starts(muse: Muse) -> None:
    err = ok(muse.with_recipe("fit", "--resume", "--trainer.max_steps=1"))
    assert "resume: no run in runs/tiny has a checkpoint that is whole; a new run starts\n" in err
    assert muse.versions() == ["runs/tiny/version_0"]
    assert not list(RUN.glob("*step=*"))


def test_a_run_that_starts_from_a_checkpoint_is_resumed_by_the_same_command(
    muse: Muse, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = muse.folder / "start.ckpt"
    ok(muse.with_recipe("fit", "--trainer.max_steps=1", "--run.name=start"))
    saved = checkpoint(1, Path("runs/start/version_0"))
    saved.rename(start)
    manifest_path(saved).rename(manifest_path(start))
    command = ("fit", "--resume", f"--ckpt_path={start}", "--trainer.max_steps=4", *EVERY_STEP)
    ok(muse.with_recipe(*command, "--run.name=whole"))
    with monkeypatch.context() as patched:
        sends(patched, signal.SIGTERM, at_step=2)
        code, _, err = muse.with_recipe(*command)
    assert code == 75
    none = "resume: no run in runs/tiny has a checkpoint that is whole; a new run starts from"
    assert f"{none} {start}\n" in err
    start.unlink()  # it has been needed
    assert muse.error("fit", "--config=recipe.yaml", "--resume", "--ckpt_path=x", "--trainer.max_steps=4") == (
        f"ckpt_path: x found beside resume, but {RUN}, which would go on, started from {start}; accepted: {start}, or "
        "another run.name"
    )
    err = ok(muse.with_recipe(*command, f"--ckpt_path={os.path.relpath(start)}"))
    assert f"resume: from {checkpoint(3)}\n" in err
    assert "which wins" not in err
    assert muse.versions() == ["runs/start/version_0", "runs/tiny/version_0", "runs/whole/version_0"]
    assert hashes(RUN) == hashes(Path("runs/whole/version_0"))
    assert losses(RUN) == losses(Path("runs/whole/version_0"))
    for name in ("config.yaml", "config.step=3.yaml"):
        assert Path(yaml.safe_load((RUN / name).read_text())["ckpt_path"]).absolute() == start


def test_a_run_that_started_from_nothing_has_not_started_from_a_checkpoint(muse: Muse) -> None:
    ok(muse.with_recipe("fit", "--trainer.max_steps=1"))
    line = muse.error("fit", "--config=recipe.yaml", "--resume", f"--ckpt_path={checkpoint(1)}")
    assert line == (
        f"ckpt_path: {checkpoint(1)} found beside resume, but {RUN}, which would go on, started from nothing; "
        "accepted: no ckpt_path, or another run.name"
    )


def test_the_recipe_wins_and_what_differs_is_printed(muse: Muse) -> None:
    ok(muse.with_recipe("fit", "--trainer.max_steps=1"))
    more = ("--trainer.max_steps=2", "--model.attention.top_k=2")
    err = ok(muse.with_recipe("fit", "--resume", *more))
    where = f"in {checkpoint(1)}"
    assert f"trainer.max_steps: 1 {where}, 2 in this recipe, which wins\n" in err
    assert f"model.attention.init_args.top_k: 1 {where}, 2 in this recipe, which wins\n" in err
    assert err.count("which wins") == 2
    written = yaml.safe_load((RUN / "config.step=1.yaml").read_text())
    assert written["model"]["attention"]["init_args"]["top_k"] == 2
    assert written["resume"] is False
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["max_steps"] == 1
    # The next start differs from the last one, not from the first.
    err = ok(muse.with_recipe("fit", "--resume", *more[1:], "--trainer.max_steps=3"))
    assert [line for line in err.splitlines() if "which wins" in line] == [
        f"trainer.max_steps: 2 in {checkpoint(2)}, 3 in this recipe, which wins"
    ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def zero_tail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-3000] + bytes(3000))


DAMAGE = {
    "flipped": (flip, "its content has changed since it was saved: SHA-256 differs"),
    "cut": (cut, "bytes, its manifest says"),
    "zero-tail": (zero_tail, "its content has changed since it was saved: SHA-256 differs"),
    "no-manifest": (lambda path: manifest_path(path).unlink(), "it has no manifest, so it was not saved to its end"),
    "gone": (lambda path: path.unlink(), "No such file or directory"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "flipped" else pytest.mark.slow) for kind in DAMAGE]
)
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(muse: Muse, kind: str) -> None:
    damage: Callable[[Path], Any] = DAMAGE[kind][0]
    ok(muse.with_recipe("fit", "--trainer.max_steps=3", *EVERY_STEP))
    first = losses(RUN)
    damage(checkpoint(3))
    err = ok(muse.with_recipe("fit", "--trainer.max_steps=4", "--resume"))
    (line,) = [line for line in err.splitlines() if "is not used" in line]
    assert line.startswith(f"checkpoint {checkpoint(3)} is not used: ")
    assert DAMAGE[kind][1] in line
    assert f"resume: from {checkpoint(2)}\n" in err
    # Step 2, from 0, is trained and logged again.
    assert [step for step, _ in losses(RUN)] == [0, 1, 2, 3]
    assert losses(RUN)[:3] == first


@pytest.mark.slow
def test_a_version_without_a_whole_checkpoint_is_passed_over(muse: Muse) -> None:
    for _ in range(3):
        ok(muse.with_recipe("fit", "--trainer.max_steps=1"))
    newest = Path("runs/tiny/version_2")
    flip(checkpoint(1, newest))
    (newest.parent / "version_3").mkdir()
    err = ok(muse.with_recipe("fit", "--trainer.max_steps=2", "--resume"))
    assert "resume: from runs/tiny/version_1/checkpoints/step=1.ckpt\n" in err
    err = ok(muse.with_recipe("fit", "--trainer.max_steps=2", "--resume", "--run.version=0"))
    assert f"resume: from {checkpoint(1)}\n" in err


@pytest.mark.slow
def test_last_and_best(muse: Muse) -> None:
    """Of the newest version that has one; a new version starts from it."""
    ok(muse.with_recipe("fit", "--trainer.max_steps=3", *EVERY_STEP, "--trainer.val_check_interval=1"))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        assert "val/loss" in Manifest.read(checkpoint(step)).metrics
        Manifest.read(checkpoint(step)).with_metrics({"val/loss": loss}).write(checkpoint(step))
    for which, step, version in (("best", 2, 1), ("last", 3, 2)):
        nothing = ("--trainer.enable_checkpointing=false", "--trainer.max_steps=4")
        ok(muse.with_recipe("fit", f"--ckpt_path={which}", *nothing))
        assert [number for number, _ in losses(Path(f"runs/tiny/version_{version}"))] == list(range(step, 4))
        written = yaml.safe_load(Path(f"runs/tiny/version_{version}/config.yaml").read_text())
        assert written["ckpt_path"] == str(checkpoint(step))
    assert "step 3  val/loss" in muse.with_recipe("validate", "--ckpt_path=last")[1]


def test_the_best_of_a_checkpoint_callback_that_is_not_ours(muse_with_dataset: Muse) -> None:
    """It is saved by ours, but what a validation measured is not noted."""
    flags = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"]
    ok(muse_with_dataset.with_recipe("fit", *flags, "--trainer.val_check_interval=1"))
    (saved,) = Path("runs/tiny/version_0/checkpoints").glob("*.ckpt")
    for verb in ("validate", "test", "predict", "fit"):
        line = muse_with_dataset.error(verb, "--config=recipe.yaml", "--ckpt_path=best")
        assert line == (
            "ckpt_path: best found, the lowest val/loss, but no checkpoint in runs/tiny has one noted, as only "
            f"DurableCheckpoint does, after a validation; accepted: last, or a path, such as {saved}"
        )


def test_a_path(muse: Muse) -> None:
    ok(muse.with_recipe("fit", "--trainer.max_steps=2"))
    more = ("--trainer.max_steps=3", f"--ckpt_path={checkpoint(2)}")
    assert "warning" not in ok(muse.with_recipe("fit", *more))
    content = checkpoint(2).read_bytes()
    for damage, problem in (DAMAGE["flipped"], DAMAGE["cut"]):
        damage(checkpoint(2))
        line = muse.error("fit", "--config=recipe.yaml", *more)
        assert line.startswith(f"ckpt_path: {checkpoint(2)} is damaged: ")
        assert problem in line
        checkpoint(2).write_bytes(content)
    manifest_path(checkpoint(2)).unlink()
    err = ok(muse.with_recipe("fit", *more))
    line = f"ckpt_path: warning: {checkpoint(2)} has no step=2.manifest.json: whether it is damaged cannot be known"
    assert line in err.splitlines()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--ckpt_path=last"], "ckpt_path: last found, but no run in runs/tiny has a checkpoint that is whole"),
        (
            ["fit", "--ckpt_path=best"],
            "ckpt_path: best found, but no run in runs/tiny has a checkpoint that is whole,",
        ),
        (
            ["fit", "--resume", "--ckpt_path=last"],
            "resume: true found beside ckpt_path last; accepted beside it: a path, from which a new run starts",
        ),
        (["fit", "--resume", "--ckpt_path=x"], "ckpt_path: no checkpoint at x; expected the path of a local"),
        (["validate", "--resume"], "resume: true found; muse validate resumes nothing, muse fit does"),
        (["fit", "--ckpt_path=https://host/a.ckpt"], "ckpt_path: https://host/a.ckpt is an address; expected the path"),
    ],
    ids=["last", "best", "both", "neither", "validate", "address"],
)
def test_mistakes(muse: Muse, args: list[str], message: str) -> None:
    assert muse.error(args[0], "--config=recipe.yaml", *args[1:]).startswith(message)


@pytest.mark.slow
def test_a_resume_that_is_refused_leaves_the_run_as_it_was(muse: Muse) -> None:
    ok(muse.with_recipe("fit", "--trainer.max_steps=1"))
    (RUN / "lock").write_text("")
    (muse.folder / "source" / "one" / "module_0.py").write_text("other = 1\n" * 200)
    muse.with_recipe("prepare")
    for flag in ("--trainer.max_steps=4", "--model.betas=[2,2]", "--trainer.devices=0"):
        muse.error("fit", "--config=recipe.yaml", "--resume", flag)


def test_a_run_that_is_in_use(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TIMEOUT_S", 0.2)
    ok(muse.with_recipe("fit", "--trainer.max_steps=1"))
    held = FolderLock.acquire(RUN)
    code, _, err = muse.with_recipe("fit", "--resume", "--trainer.max_steps=2")
    held.release()
    assert (code, err.splitlines()[-1].split(" on ")[0]) == (75, f"{RUN} is in use by process {os.getpid()}")


def test_sigusr1(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    sends(monkeypatch, signal.SIGUSR1, 1)
    ok(muse.with_recipe("fit", "--trainer.max_steps=3"))
    assert steps(RUN / "checkpoints") == [2, 3]


def test_sigterm_before_the_first_step(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenDataModule, "prepare_data", lambda data: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = muse.with_recipe("fit")
    assert (code, err.splitlines()[-1].split(" outside ")[0]) == (75, "preempted")
    assert muse.versions() == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_where_nothing_is_saved(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    sends(monkeypatch, signal.SIGTERM, 1)
    code, _, err = muse.with_recipe("fit", "--trainer.enable_checkpointing=false", "--trainer.max_steps=4")
    assert code == 75, err
    assert err.splitlines()[-1].endswith("nothing more was saved")


def refuse(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_last_save_that_fails(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DurableCheckpointIO, "_write", refuse(errno.ENOSPC))
    code, _, err = muse.with_recipe("fit")
    assert code == 77
    line = f"error: checkpoint {checkpoint(2)} cannot be saved: No space left on device; earlier checkpoints stay"
    assert err.splitlines()[-1] == line


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_run_folder_that_cannot_be_written(muse: Muse, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(Path, "mkdir", refuse(code))
    found, _, err = muse.with_recipe("fit")
    assert found == 77
    assert err == f"error: run.root: cannot create a folder in runs/tiny: {os.strerror(code)}\n"


def test_storage_that_fails_elsewhere(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "training_step", refuse(errno.EIO))
    code, _, err = muse.with_recipe("fit")
    assert code == 77
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith("its storage does not take what must be kept: Input/output error")
