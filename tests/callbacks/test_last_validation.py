"""What is said of a training's end before its first step, against where Lightning then validates."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from muse_lightning.callbacks.last_validation import nearest_divisor, unvalidated_end
from muse_lightning.callbacks.stop_after import StopAfter
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer

OVER_EPOCHS: dict[str, Any] = {"check_val_every_n_epoch": None}
ENDS_BEFORE, BATCHES = "the training ends before the", "batches of trainer.val_check_interval"


class Validations(L.Callback):
    """What is said when a training starts, and after which steps it then validates."""

    def __init__(self) -> None:
        self.said: str | None = None
        self.steps: list[int] = []

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.said = unvalidated_end(trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        self.at_end = self.batches(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.is_end_validated = bool(self.steps) and self.at_end == self.batches(trainer)

    @staticmethod
    def batches(trainer: L.Trainer) -> int:
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def fit(
    folder: Path, *callbacks: L.Callback, epoch: int = 12, val: int = 1, resume: Path | None = None, **options: Any
) -> Validations:
    seen = Validations()
    trainer = tiny_trainer(folder, callbacks=[seen, *callbacks], **options)
    data = TinyData(batches(epoch, batch_size=1), batches(val, batch_size=1))
    trainer.fit(tiny_model(), datamodule=data, ckpt_path=resume, weights_only=False)
    trainer.save_checkpoint(folder / "saved.ckpt")
    return seen


def line(found: str, interval: int) -> str:
    return f"validation: {found}; a trainer.val_check_interval of {interval} batches has one at the end"


def named(options: dict[str, Any]) -> str:
    return "-".join(f"{name.split('_')[0]}={value}" for name, value in options.items())


@pytest.mark.parametrize(
    ("options", "last", "advised"),
    [
        ({"max_steps": 7, "val_check_interval": 3}, 6, 7),
        ({"max_steps": 10, "val_check_interval": 4}, 8, 5),
        ({"max_steps": 10, "val_check_interval": 5}, 10, None),
        ({"max_steps": 5, "val_check_interval": 4, "accumulate_grad_batches": 2}, 4, 2),
        ({"max_steps": 4, "val_check_interval": 3, "accumulate_grad_batches": 2}, 3, 4),
        ({"max_steps": 4, "val_check_interval": 4, "accumulate_grad_batches": 2}, 4, None),
        ({"max_steps": 10, "val_check_interval": 4, "epoch": 3}, 8, 5),
        # Epochs of two steps, the second of three batches: 32 in nine steps, 25 in seven.
        ({"max_steps": 9, "val_check_interval": 5, "epoch": 7, "accumulate_grad_batches": 4}, 8, 4),
        ({"max_steps": 9, "val_check_interval": 8, "epoch": 7, "accumulate_grad_batches": 4}, 9, None),
        ({"max_steps": 8, "val_check_interval": 14, "epoch": 7, "accumulate_grad_batches": 4}, 8, None),
        ({"max_steps": 7, "val_check_interval": 6, "epoch": 7, "accumulate_grad_batches": 4}, 6, 5),
        ({"max_steps": 7, "val_check_interval": 3, "check_val_every_n_epoch": 1}, 6, 7),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_it_is_said_where_the_end_is_not_validated(
    tmp_path: Path, options: dict[str, Any], last: int, advised: int | None
) -> None:
    options = OVER_EPOCHS | options
    seen = fit(tmp_path, **options)
    found = f"the last one is after step {last} of {options['max_steps']}"
    assert seen.steps[-1] == last
    assert seen.said == (None if advised is None else line(found, advised))
    assert seen.is_end_validated == (advised is None)
    if advised is not None:
        seen = fit(tmp_path, **(options | {"val_check_interval": advised}))
        assert (seen.said, seen.is_end_validated) == (None, True)


def test_without_a_divisor_near_what_was_asked_none_is_advised(tmp_path: Path) -> None:
    seen = fit(tmp_path, max_steps=31, val_check_interval=6, **OVER_EPOCHS)
    found = "the last one is after step 30 of 31"
    assert seen.said == f"validation: {found}; no trainer.val_check_interval near 6 divides its 31 batches"


@pytest.mark.parametrize(
    ("options", "said", "steps"),
    [
        ({"max_steps": 9, "val_check_interval": 4}, line("the last one is after step 8 of 9", 3), [8]),
        ({"max_steps": 7, "val_check_interval": 4}, line("none from step 5 to 7", 7), []),
        ({"max_steps": 8, "val_check_interval": 4}, None, [8]),
        ({"max_steps": 8, "val_check_interval": 9}, f"validation: none, {ENDS_BEFORE} 9 {BATCHES}", []),
        # Five batches before it, and two for each step since of which the first has had one: 12.
        ({"max_steps": 9, "val_check_interval": 6, "accumulate_grad_batches": 2}, None, [6, 9]),
        (
            {"max_steps": 9, "val_check_interval": 5, "accumulate_grad_batches": 2},
            line("the last one is after step 8 of 9", 6),
            [8],
        ),
        ({"max_steps": 5, "val_check_interval": 4}, None, []),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_a_resumed_training_goes_on_counting(
    tmp_path: Path, options: dict[str, Any], said: str | None, steps: list[int]
) -> None:
    fit(tmp_path, max_steps=5, limit_val_batches=0)
    seen = fit(tmp_path, resume=tmp_path / "saved.ckpt", **(OVER_EPOCHS | options))
    assert (seen.said, seen.steps) == (said, steps)


@pytest.mark.parametrize("resumed", [8, 9], ids=["at-the-end-of-an-epoch", "within-one"])
def test_a_resume_in_a_later_epoch(tmp_path: Path, resumed: int) -> None:
    """Epochs of four steps, the last of them of one batch: 23 batches in 13 steps."""
    options = OVER_EPOCHS | {"epoch": 7, "accumulate_grad_batches": 2}
    fit(tmp_path, max_steps=resumed, limit_val_batches=0, **options)
    seen = fit(tmp_path, resume=tmp_path / "saved.ckpt", max_steps=13, val_check_interval=5, **options)
    assert (seen.said, seen.steps[-1]) == (line("the last one is after step 11 of 13", 23), 11)


@pytest.mark.parametrize("interval", [2, 20])
@pytest.mark.parametrize(("step", "is_stopped"), [(3, True), (5, True), (6, False)], ids=["before", "at", "beyond"])
def test_a_stop_is_validated(tmp_path: Path, step: int, is_stopped: bool, interval: int) -> None:
    seen = fit(tmp_path, StopAfter(step), max_steps=5, val_check_interval=interval, **OVER_EPOCHS)
    assert seen.steps == [each for each in (2, 4) if interval == 2 and each < step] + [step] * is_stopped
    assert (seen.said is None) == is_stopped


@pytest.mark.parametrize(
    "options",
    [
        {"limit_val_batches": 0},
        {"val": 0},
        {"val_check_interval": "00:01:00:00"},
        {"val_check_interval": 0.25, "check_val_every_n_epoch": 1},
        {"max_steps": 13, "val_check_interval": 3, "check_val_every_n_epoch": 1},
        {"check_val_every_n_epoch": 2},
        {"max_epochs": 1},
    ],
    ids=named,
)
def test_nothing_is_said_of_what_is_not_validated_or_not_known(tmp_path: Path, options: dict[str, Any]) -> None:
    assert fit(tmp_path, **({"max_steps": 7, "val_check_interval": 4} | OVER_EPOCHS | options)).said is None


@pytest.mark.parametrize(
    ("number", "wanted", "unit", "nearest"),
    [
        (1680, 200, 1, 210),
        (1680, 170, 1, 168),
        (2804, 400, 4, 2804),
        (1699, 200, 1, 1699),
        (10, 3, 4, 2),
        (36, 6, 1, 6),
    ],
)
def test_the_divisor_nearest_to_what_was_asked(number: int, wanted: int, unit: int, nearest: int) -> None:
    assert nearest_divisor(number, wanted, unit=unit) == nearest
