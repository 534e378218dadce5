"""`muse fit` ends with 76 where nothing is finite, and `muse fit --replay FILE` repeats the step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_lightning.checkpoints.manifest import Manifest, manifest_path
from muse_lightning.files import sha256_file
from muse_lightning.numerics.failed_step import KEY
from muse_lightning.training.module import LanguageModel
from tests.recipe import Muse, start

DIVERGES = ("--model.learning_rate=1e25", "--trainer.max_steps=20", "--trainer.accumulate_grad_batches=2")
"""The first step throws the weights so far that the second overflows, and every one after it."""


@pytest.fixture
def muse(muse_with_dataset: Muse) -> Muse:
    return muse_with_dataset


@pytest.fixture
def stopped(muse: Muse) -> Path:
    """The file that a run has left."""
    code, _, err = muse.with_recipe("fit", *DIVERGES)
    path = Path("runs/tiny/version_0/numerics/step=2.replay.ckpt")
    assert code == 76, err
    assert "Traceback" not in err
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line == (
        "error: 5 steps in a row had no finite loss and gradient; step 2 is saved: muse fit --replay " + str(path)
    )
    return path


def change(path: Path, **values: object) -> None:
    """What the file says of its step, otherwise; or its weights made finite."""
    checkpoint = torch.load(path, weights_only=True)
    if values.pop("is_finite", False):
        for tensor in checkpoint["state_dict"].values():
            tensor.clamp_(-0.1, 0.1)
    checkpoint[KEY] |= values
    torch.save(checkpoint, path)
    Manifest(2, path.stat().st_size, sha256_file(path)).write(path)


def test_the_step_comes_again(muse: Muse, stopped: Path) -> None:
    Path("recipe.yaml").unlink()  # the file alone is enough
    for folder in ("source", "dataset"):
        Path(folder).rename(f"{folder}-gone")
    code, out, err = muse("fit", "--replay", str(stopped))
    assert (code, err.count("error")) == (0, 0), err
    lines = out.splitlines()
    assert lines[0] == f"replay: {stopped}: step 2 of 1 rank(s)"
    assert lines[-1] == "reproduced"
    found = [line for line in lines if line.startswith("rank 0, micro-batch ")]
    assert len(found) == 2
    assert all("first not finite: " in line and "llama.model." in line for line in found)
    [loss] = [line for line in lines if line.startswith("loss ")]
    again, recorded = loss.removeprefix("loss ").split(", of the run ")
    assert again == recorded, "bit for bit on a processor"
    assert "gradient norm nan, of the run nan" in lines
    assert any(line.startswith("gradients that are not finite: llama.model.") for line in lines)
    assert muse.versions() == ["runs/tiny/version_0"], "a replay leaves no run"

    change(stopped, is_finite=True)
    error = muse.error("fit", f"--replay={stopped}")
    assert error.startswith(
        f"replay: {stopped}: not reproduced: a loss or gradient that is not finite expected; found loss "
    )
    # A step that was not the same twice, on a processor that is sound.
    change(stopped, differs=["llama.model.norm.weight"])
    error = muse.error("fit", f"--replay={stopped}")
    assert "not reproduced: gradients that are not the same twice expected; found loss " in error
    change(stopped, settings="model: {attention: evil.Thing}")
    error = muse.error("fit", f"--replay={stopped}")
    assert error.startswith("model.attention: evil.Thing is outside the modules a configuration may name, torch, ")
    assert error.endswith(f" (settings in {stopped}); to trust it, add --allow_module evil")


def replayed(
    muse: Muse, monkeypatch: pytest.MonkeyPatch, path: Path, what: Callable[[LanguageModel], object]
) -> list[object]:
    """`what` of the model at each of the step's micro-batches."""
    seen = []
    nats = LanguageModel.total_nats

    def watched(model: LanguageModel, batch: Any) -> torch.Tensor:
        seen.append(what(model))
        return nats(model, batch)

    monkeypatch.setattr(LanguageModel, "total_nats", watched)
    assert muse("fit", "--replay", str(path))[0] == 0
    return seen


def test_heads_that_were_exact_are_exact_again(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = muse.with_recipe("fit", *DIVERGES, "--model.attention=Muse", "--model.exact_heads=1")
    path = Path("runs/tiny/version_0/numerics/step=2.replay.ckpt")
    assert code == 76, err
    checkpoint = torch.load(path, weights_only=True)
    assert sum(map(len, checkpoint[KEY]["exact_heads"].values())) == 1
    change(path, exact_heads={0: [], 1: [1]})
    assert replayed(muse, monkeypatch, path, lambda model: model.chosen_heads) == [{0: [], 1: [1]}] * 2


@pytest.mark.parametrize("steps", [1, 8], ids=["no longer", "still"])
def test_what_attended_exactly_does_so_again(muse: Muse, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    options = (f"steps={steps}", "start=12", "exact=true")
    flags = ["--trainer.callbacks+=ContextWarmup", *(f"--trainer.callbacks.{option}" for option in options)]
    code, _, err = muse.with_recipe("fit", *DIVERGES, "--model.attention=Muse", *flags)
    path = Path("runs/tiny/version_0/numerics/step=2.replay.ckpt")
    assert code == 76, err
    assert replayed(muse, monkeypatch, path, lambda model: model.attends_exactly) == [steps == 8] * 2


def test_flags_win_over_the_settings_in_the_file(muse: Muse, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as it sets it; here, to be taken back
    modes, total_nats = [], LanguageModel.total_nats

    def noted(model: LanguageModel, batch: Any) -> torch.Tensor:
        modes.append(torch.are_deterministic_algorithms_enabled())
        return total_nats(model, batch)

    monkeypatch.setattr(LanguageModel, "total_nats", noted)
    flags = ("--model.attention={class_path: Dense, init_args: {}}", "--model.recompute=block")
    code, out, err = muse("fit", f"--replay={stopped}", *flags, "--trainer.deterministic=true")
    assert code == 0, err
    assert modes == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert out.splitlines()[-1] == "reproduced"
    error = muse.error("fit", f"--replay={stopped}", "--model.config.hidden_size=32")
    assert "hidden_size" in error or "embed_tokens" in error
    # What was stopped at can be gone on from, behind the batches that were skipped.
    code, _, err = muse.with_recipe("fit", f"--ckpt_path={stopped}", "--trainer.max_steps=12")
    assert code == 76, err
    [line] = [line for line in err.splitlines() if line.startswith("numerics: step 8 skipped: ")]
    assert line.endswith("; 1 in a row, of 5 at most, 7 in all")
    assert "error: 5 steps in a row" in err


def test_files_that_hold_no_step(muse: Muse) -> None:
    wanted = r"expected numerics/step=N.replay.ckpt of a run"
    assert wanted in muse.error("fit", "--replay=nowhere.ckpt")
    assert "not a whole file of torch.save" in muse.error("fit", "--replay", "recipe.yaml")
    torch.save({"state_dict": {}, "global_step": 1}, "plain.ckpt")
    assert "is a checkpoint without a step to replay" in muse.error("fit", "--replay=plain.ckpt")
    torch.save({"state_dict": {}, KEY: {"step": "two"}}, "odd.ckpt")
    assert "is a checkpoint without a step to replay" in muse.error("fit", "--replay=odd.ckpt")
    Manifest(1, 5, "0").write(Path("plain.ckpt"))
    assert "plain.ckpt is damaged: it has" in muse.error("fit", "--replay=plain.ckpt")
    assert manifest_path(Path("plain.ckpt")).exists()
    assert "--replay: a file must follow" in muse.error("fit", "--config=recipe.yaml", "--replay")


def test_verify_every_is_a_flag_of_fit(muse: Muse) -> None:
    assert "verify_every: 2 found; muse validate verifies no step" in muse.error(
        "validate", "--config=recipe.yaml", "--verify_every=2"
    )
    assert "verify_every" in muse.error("fit", "--config=recipe.yaml", "--verify_every=0")
    code, _, err = muse.with_recipe("fit", "--verify_every=2", "--trainer.max_steps=4")
    assert code == 0, err
    assert "verify_every: 2" in Path("runs/tiny/version_0/config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_ranks(muse: Muse, strategy: str) -> None:
    """Both stop; the first has the exit code, and the file the batches of both."""
    ranks = ("--trainer.devices=2", f"--trainer.strategy={strategy}", "--data.batch_size=1")
    run = start(["fit", "--config=recipe.yaml", *ranks, *DIVERGES], Path("log"))
    run.join(300)
    assert run.exitcode == 76, Path("log").read_text()
    assert "Traceback" not in Path("log").read_text()
    path = Path("runs/tiny/version_0/numerics/step=2.replay.ckpt")
    step = torch.load(path, weights_only=True)[KEY]
    assert [len(micro_batches) for micro_batches in step["ranks"]] == [2, 2]
    code, out, err = muse("fit", f"--replay={path}")
    assert code == 0, err
    assert out.splitlines()[-1] == "reproduced"
    assert "step 2 of 2 rank(s)" in out
