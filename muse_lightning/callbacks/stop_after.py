"""The end of a training before its last step."""

from typing import Any

import lightning as L

from muse_lightning.errors import UserError


class StopAfter(L.Callback):
    """Ends a training at an optimizer step before `max_steps`, by which the learning rate falls as it would have.

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
        """A training that is resumed at its end, or behind it, takes no step more."""
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
    return [callback.step for callback in trainer.callbacks if isinstance(callback, StopAfter)]  # type: ignore[attr-defined]
