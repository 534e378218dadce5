"""`muse validate`, `test` and `predict` that are told to end are not taken for complete."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from muse_lightning.callbacks.stop_evaluation import StopEvaluation
from muse_lightning.checkpoints.preemption import SignalFlags, stoppable
from muse_lightning.errors import RetryError
from muse_lightning.training.module import LanguageModel
from tests.recipe import Muse, start
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer

FLAGS = ("--trainer.enable_progress_bar=false", "--trainer.callbacks=[]")
TOLD = """
import os, signal
import lightning as L

class Told(L.Callback):
    def on_validation_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if batch_idx == 0 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            print("the batch in hand goes on", flush=True)
"""


@pytest.fixture
def muse(muse_with_dataset: Muse) -> Muse:
    return muse_with_dataset


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """`stoppable`, alone, is for a program that ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def said(verb: str) -> str:
    return f"preempted: muse {verb} is not complete, and its run folder is removed; start it again"


@pytest.mark.parametrize(
    ("verb", "step"),
    [
        ("validate", "configure_model"),
        ("validate", "on_validation_start"),
        ("validate", "validation_step"),
        ("validate", "on_validation_epoch_end"),
        ("test", "test_step"),
        ("predict", "predict_step"),
    ],
)
def test_it_is_not_complete(muse: Muse, monkeypatch: pytest.MonkeyPatch, verb: str, step: str) -> None:
    """No figures, no folder that looks like a whole evaluation, and a scheduler starts it again."""
    method = getattr(LanguageModel, step)

    def told(model: LanguageModel, *args: Any) -> Any:
        # Of a prediction, a file is there by now.
        if not (step == "predict_step" and args[1] == 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return method(model, *args)

    monkeypatch.setattr(LanguageModel, step, told)
    code, out, err = muse.with_recipe(verb, *FLAGS, "--data.batch_size=1")
    assert (code, err.splitlines()[-1]) == (75, said(verb))
    assert "run: " not in err
    assert "bpb" not in out
    assert muse.versions() == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_complete_stays_so(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the results are printed."""
    leave = SignalFlags.leave

    def told(flags: SignalFlags) -> None:
        leave(flags)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SignalFlags, "leave", told)
    code, out, err = muse.with_recipe("validate", *FLAGS)
    assert (code, err.splitlines()[-1]) == (0, "run: runs/tiny/version_0")
    assert "val/bpb" in out


class Long(L.Callback):
    """Works on a batch for long, and is told to end meanwhile, perhaps where a library catches all errors."""

    def __init__(self, is_swallowed: bool) -> None:
        self.is_swallowed = is_swallowed
        self.batches: list[int] = []

    def on_validation_batch_end(self, *args: Any) -> None:
        self.batches.append(args[-1])
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            if not self.is_swallowed:
                raise
        self.batches.append(args[-1])


@pytest.mark.parametrize("is_swallowed", [False, True])
def test_it_ends_while_a_callback_works(tmp_path: Path, is_swallowed: bool) -> None:
    long = Long(is_swallowed)
    trainer = tiny_trainer(tmp_path, callbacks=[long, StopEvaluation()])
    with pytest.raises(RetryError, match="not complete"), stoppable("not complete"):
        trainer.validate(tiny_model(), datamodule=TinyData([], batches(3)))
    assert long.batches == ([0, 0] if is_swallowed else [0])


def test_the_next_evaluation_of_the_same_callback_listens_again(tmp_path: Path) -> None:
    stop, long = StopEvaluation(), Long(is_swallowed=False)
    tiny_trainer(tmp_path, callbacks=[stop]).validate(tiny_model(), datamodule=TinyData([], batches(2)))
    with pytest.raises(RetryError), stoppable():
        tiny_trainer(tmp_path, callbacks=[long, stop]).validate(tiny_model(), datamodule=TinyData([], batches(2)))
    assert long.batches == [0]


@pytest.mark.multi_process
def test_two_processes_of_which_the_second_is_told(muse: Muse) -> None:
    """Both end behind the batch in hand, and neither waits for the other."""
    Path("told.py").write_text(TOLD)
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1")
    command = ["validate", "--config=recipe.yaml", *ranks, "--trainer.enable_progress_bar=false"]
    run = start([*command, "--allow_module=told", "--trainer.callbacks+=told.Told"], Path("log"))
    run.join(240)
    log = Path("log").read_text()
    assert run.exitcode == 75, log
    assert "the batch in hand goes on\n" in log
    assert log.count(said("validate")) == 1
    assert "val/bpb" not in log
    assert muse.versions() == []
