"""Errors of libraries, and the line that each ends as."""

from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from muse_lightning.endings import as_user_error
from muse_lightning.training.module import LanguageModel
from tests.recipe import Muse


def first_step_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make the first training step end with an error."""

    def training_step(model: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        raise error

    monkeypatch.setattr(LanguageModel, "training_step", training_step)


def test_what_a_library_says() -> None:
    error = as_user_error(MisconfigurationException("cannot open\nhttps://u:hunter2@h/a"), Namespace())
    assert str(error) == "trainer: cannot open https://h/a"


def test_fewer_batches_than_an_interval_of_validation(muse: Muse) -> None:
    muse.with_recipe("prepare")
    message = muse.error("fit", "--config", "recipe.yaml", "--trainer.val_check_interval=1000")
    assert message.startswith("trainer.val_check_interval: 1000 found, an epoch has ")
    assert message.endswith("trainer.check_val_every_n_epoch=null to count over epochs")


@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_a_monitor_that_is_never_logged(muse_with_dataset: Muse, callback: str) -> None:
    """Known with the first validation; the run has trained by then, and stays."""
    flags = [f"--trainer.callbacks+={callback}", "--trainer.callbacks.monitor=val_loss"]
    code, _, err = muse_with_dataset.with_recipe("fit", *flags, "--trainer.val_check_interval=1")
    assert code == 2, err
    assert "Traceback" not in err
    assert "step 2" not in err
    line = err.splitlines()[-1]
    assert line.startswith(f"error: trainer.callbacks: {callback} monitors 'val_loss', which was not logged; nearest: ")
    nearest, logged = (part.split(", ") for part in line.split("nearest: ")[1].split("; logged: "))
    assert nearest[0] == "val/loss"
    assert {"train/loss", "val/loss", "val/loss_exact"} - set(logged) == set()
    assert muse_with_dataset.versions() == ["runs/tiny/version_0"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["patience=1", "min_delta=9"], "stopped early, at step 4 of 6: Monitored metric val/loss did not improve in"),
        (["stopping_threshold=99"], "stopped early, at step 2 of 6: Stopping threshold reached: val/loss = "),
        (["patience=9"], None),
    ],
    ids=["patience", "threshold", "none"],
)
def test_an_early_stop_says_why(muse_with_dataset: Muse, flags: list[str], said: str | None) -> None:
    given = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    given += [f"--trainer.callbacks.{flag}" for flag in flags]
    code, _, err = muse_with_dataset.with_recipe(
        "fit", *given, "--trainer.max_steps=6", "--trainer.val_check_interval=2"
    )
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith("stopped early")]
    assert len(lines) == (said is not None)
    if said is not None:
        assert lines[0].startswith(said)
        assert "Signaling" not in lines[0]
        assert err.splitlines()[-1].startswith("run: ")


@pytest.mark.parametrize("is_behind", [False, True], ids=["itself", "behind-another"])
def test_out_of_gpu_memory(muse: Muse, monkeypatch: pytest.MonkeyPatch, is_behind: bool) -> None:
    assert muse.with_recipe("prepare")[0] == 0
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total")
    if is_behind:
        other = RuntimeError("a compiled function has failed")
        other.__cause__, error = error, other
    first_step_raises(monkeypatch, error)
    said = muse.error("fit", "--config=recipe.yaml", "--trainer.accumulate_grad_batches=3")
    assert said.startswith(
        "out of GPU memory, 2.50 GiB more was needed; next: data.batch_size=1 trainer.accumulate_grad_batches=6 "
        "(predicted peak "
    )


def test_out_of_gpu_memory_where_no_prediction_can_be_made(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    assert muse.with_recipe("prepare")[0] == 0
    first_step_raises(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"))

    def fail(*_: object) -> None:
        raise RuntimeError("a strategy that reads values")

    monkeypatch.setattr("muse_lightning.endings.next_lever", fail)
    assert muse.error("fit", "--config=recipe.yaml").endswith(
        "next: lower data.seq_len (now 32) or data.batch_size (now 2)"
    )
