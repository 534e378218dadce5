"""The callbacks of a trainer, by kind: the one place that reads an attribute that Lightning does not declare."""

from typing import TypeVar

import lightning as L

Kind = TypeVar("Kind")


def callbacks_of(trainer: L.Trainer, *kinds: type[Kind]) -> list[Kind]:
    """Those of any of these kinds, in their order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by the trainer's callback connector
    return [callback for callback in callbacks if isinstance(callback, kinds)]
