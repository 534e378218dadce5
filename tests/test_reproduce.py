"""`muse reproduce`: a run again by what it has left, what it refuses, and how it says whether losses agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from muse_lightning.reproduce import losses
from muse_lightning.reproduce.recorded import environment_differences
from tests.recipe import Muse

RUN = Path("runs/tiny/version_0")
SAVES = (
    "--trainer.callbacks+=DurableCheckpoint",
    "--trainer.callbacks.every_n_steps=2",
    "--trainer.callbacks.is_asynchronous=false",
)
AGAIN = Path("runs/tiny/version_1")


@pytest.fixture
def muse(muse_with_dataset: Muse) -> Muse:
    return muse_with_dataset


def trained(muse: Muse, *flags: str) -> None:
    code, _, err = muse.with_recipe("fit", *flags)
    assert code == 0, err


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON or YAML file holds."""
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(muse: Muse, *flags: str) -> list[str]:
    """The lines that tell the differences of a command that is refused and leaves no trace."""
    before = muse._contents()
    code, _, err = muse("reproduce", str(RUN), *flags)
    assert code == 2, err
    assert muse._contents() == before
    *lines, last = err.splitlines()
    assert last.startswith(f"error: {RUN}: {len(lines)} difference")
    assert last.endswith("restore what was, or give --ignore_differences")
    return [line.removeprefix("reproduce: ") for line in lines]


def test_a_run_whose_steps_were_verified(muse: Muse) -> None:
    trained(muse, "--trainer.max_steps=2", "--verify_every=1")
    code, out, err = muse("reproduce", str(RUN))
    assert code == 0, err
    assert "train/loss: equal bit for bit at 2 of 2 logged steps" in out.splitlines()


def test_equal_in_a_new_version_and_what_is_recorded(muse: Muse) -> None:
    trained(muse, "--trainer.max_steps=4", "--trainer.val_check_interval=2", "--run.version=0")
    code, out, err = muse("reproduce", str(RUN))
    assert code == 0, err
    assert out.splitlines()[-2:] == [
        "train/loss: equal bit for bit at 4 of 4 logged steps",
        "val/loss: equal bit for bit at 2 of 2 logged steps",
    ]
    assert err.splitlines()[-1] == f"run: {AGAIN.absolute()}"
    then, now = (json.loads((run / "environment.json").read_text()) for run in (RUN, AGAIN))
    assert then["reproduces"] is None
    assert now["reproduces"] == str(RUN.absolute())
    assert then["command"] == ["muse", "fit", "--config", "recipe.yaml", "--trainer.max_steps=4",
                               "--trainer.val_check_interval=2", "--run.version=0"]  # fmt: skip
    card = json.loads(Path("dataset/dataset.json").read_text())
    assert then["data"] == [{"name": "dataset", "fingerprint": card["fingerprint"]}]
    assert then["seed"] == 42
    assert then["distributions"]["lightning"] == then["packages"]["lightning"]


def test_another_loss_is_told_with_its_step_and_fewer_steps_do(muse: Muse) -> None:
    """Another seed than the events are of; then what hides the difference."""
    trained(muse, "--trainer.max_steps=5", "--trainer.limit_val_batches=0")
    edit(RUN / "config.yaml", lambda config: config.update(seed_everything=7))
    code, out, err = muse("reproduce", str(RUN), "--steps=3")
    assert code == 3, err
    assert "steps: 0 to 3, 64 tokens each, 192 in all" in err
    assert "0.11 epochs" in err
    assert out.splitlines()[0].startswith("step 1/3 ")
    first, batches = out.splitlines()[-2:]
    assert first.startswith("train/loss: first difference at step 0: ")
    assert first.endswith("; equal at 0 of 3 logged steps")
    assert batches == "batches: first difference at batch 0"
    assert sorted(losses.logged_losses(AGAIN)["train/loss"]) == [0, 1, 2]
    # The learning rate falls as if there were five steps.
    assert yaml.safe_load((AGAIN / "config.yaml").read_text())["trainer"]["max_steps"] == 5
    assert muse("reproduce", str(RUN), "--steps=1", "--tolerance=10")[0] == 0


def test_the_last_validation_counts_and_the_clock_does_not(muse: Muse) -> None:
    """A run that ended between two logged training losses, by a clock that this machine could miss."""
    trained(muse, "--trainer.max_steps=5", "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=5")
    edit(RUN / "config.yaml", lambda config: config["trainer"].update(max_time="00:00:00:00"))
    code, out, err = muse("reproduce", str(RUN))
    assert code == 0, err
    assert out.splitlines()[-2:] == [
        "train/loss: equal bit for bit at 2 of 2 logged steps",
        "val/loss: equal bit for bit at 1 of 1 logged steps",
    ]


def test_resumed_runs_are_reproduced_as_one(muse: Muse) -> None:
    """Two starts of one configuration; a third that changed it bounds what can be."""
    saves = (*SAVES, "--trainer.max_steps=4")
    trained(muse, *saves)
    for path in (RUN / "checkpoints").glob("step=4.*"):
        path.unlink()
    trained(muse, *saves, "--resume")
    code, out, err = muse("reproduce", str(RUN))
    assert code == 0, err
    assert "train/loss: equal bit for bit at 4 of 4 logged steps" in out
    trained(muse, *saves, "--resume", "--run.version=0", "--trainer.max_steps=6", "--model.learning_rate=0.1")
    assert refused(muse) == [
        "from step 4 on, model.learning_rate: 0.1 in config.step=4.yaml, 0.0003 in config.yaml",
        "from step 4 on, trainer.max_steps: 6 in config.step=4.yaml, 4 in config.yaml",
    ]
    code, out, err = muse("reproduce", str(RUN), "--steps=4")
    assert code == 0, err


def test_a_run_that_began_with_a_checkpoint(muse: Muse) -> None:
    """Steps count from there; the checkpoint must be the one that it was."""
    trained(muse, "--trainer.max_steps=2", "--run.name=first")
    checkpoint = Path("runs/first/version_0/checkpoints/step=2.ckpt")
    trained(muse, "--trainer.max_steps=6", f"--ckpt_path={checkpoint}")
    code, out, err = muse("reproduce", str(RUN), "--steps=3")
    assert code == 0, err
    assert "train/loss: equal bit for bit at 3 of 3 logged steps" in out
    assert sorted(losses.logged_losses(AGAIN)["train/loss"]) == [2, 3, 4]
    edit(RUN / "environment.json", lambda found: found["checkpoint"].update(sha256="0" * 64))
    (line,) = refused(muse)
    assert line.startswith("checkpoint: 000000000000 then, ")
    checkpoint.unlink()
    message = f"ckpt_path: no checkpoint at {checkpoint}; expected the path of a local checkpoint, last, or best"
    assert muse.error("reproduce", str(RUN)) == message


def test_a_run_that_ended_with_numbers_that_are_not_finite(muse: Muse) -> None:
    """It does so again, and its losses agree."""
    diverges = ("--model.learning_rate=1e25", "--trainer.max_steps=20", "--trainer.limit_val_batches=0")
    assert muse.with_recipe("fit", *diverges)[0] == 76
    code, out, err = muse("reproduce", str(RUN))
    assert code == 0, err
    assert "reproduce: 5 steps in a row had no finite loss and gradient; " in err
    logged = len(losses.logged_losses(RUN)["train/loss"])
    assert logged >= 6
    assert f"train/loss: equal bit for bit at {logged} of {logged} logged steps" in out


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "torch": (lambda found: found["packages"].update(torch="2.0.1"), "torch: 2.0.1 then, "),
    "package": (lambda found: found["distributions"].update(numpy="1.0"), "numpy: 1.0 then, "),
    "gone": (lambda found: found["distributions"].update(other="1.0"), "other: 1.0 then, not installed now"),
    "gpu": (lambda found: found.update(devices=["NVIDIA H100, 79 GiB"]), "devices: NVIDIA H100, 79 GiB then, CPU"),
    "driver": (lambda found: found.update(driver="1.2\x1b"), "driver: 1.2? then, "),
    "code": (lambda found: found.update(source_sha256="0" * 64, git_revision="abc"), "muse-lightning: abc then, "),
    "data": (lambda found: found["data"][0].update(fingerprint="0" * 64), "data: 000000000000 then, "),
}


def test_differences_refuse_it_unless_they_are_to_be_ignored(muse: Muse) -> None:
    trained(muse, "--trainer.limit_val_batches=0")
    text = (RUN / "environment.json").read_text()
    changed = json.loads(text)
    for name, (change, line) in CHANGES.items():
        then = json.loads(text)
        change(then)
        (found,) = environment_differences(then, json.loads(text))
        assert found.startswith(line), name
        change(changed)
    (found,) = environment_differences({**json.loads(text), "distributions": None}, json.loads(text))
    assert found.startswith("installed packages: not recorded then, ")
    (RUN / "environment.json").write_text(json.dumps(changed))
    assert refused(muse) == environment_differences(changed, json.loads(text))
    (RUN / "environment.json").write_text(text)
    edit(RUN / "environment.json", CHANGES["torch"][0])
    code, out, err = muse("reproduce", str(RUN), "--ignore_differences")
    assert (code, "reproduce: torch: 2.0.1 then, " in err) == (0, True), err
    assert "train/loss: equal bit for bit at 2 of 2 logged steps" in out


def test_data_that_has_changed_or_gone_is_not_prepared_again(muse: Muse) -> None:
    trained(muse, "--trainer.limit_val_batches=0")
    (muse.folder / "source" / "one" / "module_0.py").write_text("other = 1\n" * 200)
    assert muse("reproduce", str(RUN), "--steps=1")[0] == 0
    assert muse.with_recipe("prepare")[0] == 0
    (line,) = refused(muse)
    assert line.startswith("data: ")
    Path("dataset").rename("elsewhere")
    assert muse.error("reproduce", str(RUN)).startswith("dataset is not a prepared dataset: dataset.json: No such file")


def damaged(muse: Muse, change: Callable[[], Any], message: str, *flags: str) -> None:
    change()
    assert muse.error("reproduce", str(RUN), *flags).startswith(message)


def test_what_is_no_run_or_not_whole(muse: Muse) -> None:
    trained(muse, "--trainer.logger=false", "--trainer.enable_checkpointing=false")
    damaged(muse, lambda: None, f"run: {RUN.absolute()} has no TensorBoard events with train/loss: there is nothing")
    trained(muse, "--run.root=other", "--trainer.log_every_n_steps=2")
    for path in Path("other/tiny/version_0").glob("events*"):
        path.rename(RUN / path.name)
    damaged(muse, lambda: None, f"steps: 1 found, but the first train/loss of {RUN} is of its step 2;", "--steps=1")
    hostile = {"class_path": "os.system", "init_args": {"command": "touch owned"}}
    text = (RUN / "config.yaml").read_text()
    edit(RUN / "config.yaml", lambda config: config["trainer"].update(callbacks=[hostile]))
    damaged(muse, lambda: None, "trainer.callbacks")
    assert not Path("owned").exists()
    (RUN / "config.yaml").write_text(text)
    path = RUN.absolute() / "environment.json"
    damaged(muse, lambda: path.write_text("{"), f"run: {path} is damaged: it is not JSON")
    damaged(muse, lambda: path.write_text("[]"), f"run: {path} is damaged: it holds no keys with values")
    damaged(muse, path.unlink, f"run: {path} cannot be read: No such file or directory")
    damaged(muse, (RUN / "config.yaml").unlink, f"run: {RUN.absolute()} has no config.yaml; expected the folder of")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "run: no folder"),
        ([], "required, but not given: run"),
        (["source", "--steps=0"], "steps: 0 found, at least 1 expected"),
        (["source", "--tolerance=-1"], "tolerance: -1.0 found, a number of at least 0 expected"),
        (["source", "--step=3"], "step: "),
    ],
    ids=["folder", "none", "steps", "tolerance", "flag"],
)
def test_wrong_command_lines(muse: Muse, args: list[str], message: str) -> None:
    assert muse.error("reproduce", *args).startswith(message)


def test_agreement_in_words() -> None:
    then = {"train/loss": {0: 3.0, 1: 2.0, 2: float("nan"), 9: 1.0}, "val/loss": {8: 1.0}}
    (same,) = losses.compare(then, {"train/loss": {0: 3.0, 1: 2.0, 2: float("nan"), 5: 7.0}}, steps=3)
    assert (str(same), same.largest) == ("train/loss: equal bit for bit at 3 of 3 logged steps", 0.0)
    (other,) = losses.compare(then, {"train/loss": {0: 3.0, 1: 2.25, 2: float("nan")}}, steps=3)
    line = "train/loss: first difference at step 1: 2 then, 2.25 now; largest 0.25; equal at 2 of 3 logged steps"
    assert (str(other), other.largest) == (line, 0.25)
    for gone in ({0: 3.0, 1: 2.0}, {0: 3.0, 1: 2.0, 2: 1.0}):
        assert losses.compare(then, {"train/loss": gone}, steps=3)[0].largest == float("inf")
