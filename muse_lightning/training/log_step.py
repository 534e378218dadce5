"""When to log: the one place that knows how Lightning counts."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L


def is_log_step(trainer: L.Trainer, step: int) -> bool:
    """Whether Lightning writes what is logged when optimizer step number `step` (from 1) has ended."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the trainer's logger connector
    return interval > 0 and step % interval == 0


def ends_step(trainer: L.Trainer) -> bool:
    """In `on_train_batch_end`: whether the batch ended an optimizer step, and not one of its micro-batches before."""
    return not trainer.fit_loop._should_accumulate()


def written_step(trainer: L.Trainer) -> int:
    """The step at which Lightning writes what is logged now: during a fit, that of the optimizer step that has just
    ended, from 0."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@contextmanager
def counting_as_after(trainer: L.Trainer, steps: int) -> Iterator[None]:
    """During the `with` block, let a trainer that trains nothing count as a fit's validation after so many optimizer
    steps does: Lightning restores counters from a checkpoint for a fit alone."""
    loop = trainer.fit_loop.epoch_loop
    done = loop.automatic_optimization.optim_progress.optimizer.step.total
    before = loop._batches_that_stepped, done.completed
    loop._batches_that_stepped, done.completed = max(steps - 1, 0), steps
    try:
        yield
    finally:
        loop._batches_that_stepped, done.completed = before
