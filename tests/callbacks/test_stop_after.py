"""A training that ends before its last step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback

from muse_lightning.callbacks.stop_after import StopAfter, last_step
from muse_lightning.errors import UserError
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [([], 4), ([StopAfter(3)], 3), ([StopAfter(9)], 4), ([StopAfter(3), StopAfter(2)], 2)],
    ids=["none", "before", "beyond", "two"],
)
def test_a_training_ends_where_it_is_said_to(tmp_path: Path, callbacks: list[Callback], expected: int) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_steps=4, accumulate_grad_batches=2)
    assert last_step(trainer) == expected
    trainer.fit(tiny_model(), datamodule=TinyData(batches(12)))
    assert trainer.global_step == expected


@pytest.mark.parametrize(("step", "is_said"), [(3, False), (4, False), (5, True)], ids=["before", "at", "beyond"])
def test_a_stop_that_never_comes_is_said(
    tmp_path: Path, step: int, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """At the last step it ends nothing either, but has that step validated (test_last_validation.py)."""
    trainer = tiny_trainer(tmp_path, callbacks=[StopAfter(step)], max_steps=4)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer.fit(tiny_model(), datamodule=TinyData(batches(4)))
    line = f"StopAfter: step is {step}; the training ends before, trainer.max_steps is 4"
    assert [message for message in caplog.messages if "StopAfter" in message] == [line] * is_said


def test_nothing_is_said_of_an_end_that_nobody_knows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        StopAfter(3).on_train_start(SimpleNamespace(max_steps=-1, global_step=0))
    assert not caplog.messages


def test_no_step_at_all() -> None:
    with pytest.raises(UserError, match=r"^StopAfter: step is 0; accepted: at least 1$"):
        StopAfter(0)


def test_an_end_that_nobody_knows(tmp_path: Path) -> None:
    assert last_step(tiny_trainer(tmp_path, max_steps=-1)) == -1


@pytest.mark.parametrize("taken", [2, 3], ids=["at-its-step", "beyond-it"])
def test_a_resumed_training_that_has_taken_its_steps_takes_no_other(tmp_path: Path, taken: int) -> None:
    """As one resumed at `max_steps`: whoever starts a finished training again gets the same model."""
    before = tiny_trainer(tmp_path, max_steps=taken)
    before.fit(tiny_model(), datamodule=TinyData(batches(12)))
    before.save_checkpoint(tmp_path / "saved.ckpt")
    trainer = tiny_trainer(tmp_path, callbacks=[StopAfter(2)], max_steps=4)
    trainer.fit(tiny_model(), datamodule=TinyData(batches(12)), ckpt_path=tmp_path / "saved.ckpt", weights_only=False)
    assert trainer.global_step == taken
