"""The end of a training before its last step."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from muse_lightning.errors import UserError
from muse_lightning.training.trainer_callbacks import callbacks_of


class StopAfter(L.Callback):
    """Ends a training at an optimizer step before `max_steps`, by which the learning rate falls as it would have.

    The model of that step is validated. A step beyond `max_steps` ends nothing, and a line says so.

    Args:
        step: the number of optimizer steps to end at, those before a resume included.
    Raises:
        UserError: a value below 1.

    Example:
        >>> trainer = L.Trainer(callbacks=[StopAfter(100)])
    """

    def __init__(self, step: int) -> None:
        if step < 1:
            raise UserError(f"StopAfter: step is {step}; accepted: at least 1")
        self.step = step

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        """A training that is resumed at its end, or behind it, takes no step more. One that ends before is told."""
        if 0 <= trainer.max_steps < self.step:
            rank_zero_info(
                f"StopAfter: step is {self.step}; the training ends before, trainer.max_steps is {trainer.max_steps}"
            )
        self.on_train_batch_end(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Ask the trainer to stop."""
        if trainer.global_step >= self.step:
            trainer.should_stop = True


def last_step(trainer: L.Trainer) -> int:
    """The optimizer step that a training ends at: `max_steps`, -1 if there is none, or that of a `StopAfter` before."""
    return min([trainer.max_steps, *stops(trainer)])


def stops(trainer: L.Trainer) -> list[int]:
    """The steps of its `StopAfter` callbacks."""
    return [callback.step for callback in callbacks_of(trainer, StopAfter)]
