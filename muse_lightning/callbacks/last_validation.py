"""Whether the weights that a training ends with are validated: known before its first step, too late after the last."""

import math

import lightning as L

from muse_lightning.callbacks.stop_after import stops

FARTHEST = 5
"""How many times as long, or as short, an interval may be that is advised in place of another one."""


def unvalidated_end(trainer: L.Trainer) -> str | None:
    """What a training that is about to begin leaves without validation, in one line; None if nothing, or if unknown.

    Lightning validates when `val_check_batch` divides the number of batches so far, those before a resume included, and
    wherever a callback stops the training; not where that comes to `max_steps`.
    """
    interval = getattr(trainer, "val_check_batch", None)  # None: validated by the clock
    if not isinstance(interval, int) or not _validates(trainer):
        return None
    last = trainer.max_steps
    if last * trainer.accumulate_grad_batches < interval:
        return f"validation: none, the training ends before the {interval:,} batches of trainer.val_check_interval"
    # An interval that is a part of an epoch has no divisors, and one that begins anew with each epoch others in each.
    is_number = isinstance(trainer.val_check_interval, int) and trainer.check_val_every_n_epoch in (None, 1)
    if not is_number or trainer.max_epochs != -1 or not math.isfinite(trainer.num_training_batches):
        return None
    batches = _Batches(trainer)
    end = batches.at(last)
    before = end - end % interval
    if before == end or (trainer.check_val_every_n_epoch is not None and end > batches.per_epoch):
        return None
    if before > batches.done:
        found = f"the last one is after step {batches.step_at(before):,} of {last:,}"
    else:
        found = f"none from step {trainer.global_step:,} to {last:,}"
    advised = nearest_divisor(end, interval, unit=trainer.accumulate_grad_batches)
    if max(advised / interval, interval / advised) > FARTHEST:
        return f"validation: {found}; no trainer.val_check_interval near {interval:,} divides its {end:,} batches"
    return f"validation: {found}; a trainer.val_check_interval of {advised:,} batches has one at the end"


def nearest_divisor(number: int, wanted: int, *, unit: int = 1) -> int:
    """The divisor of a number that is nearest to what is wanted by their ratio; a multiple of the unit if one is."""
    unit = unit if number % unit == 0 else 1
    count = number // unit
    small = [divisor for divisor in range(1, math.isqrt(count) + 1) if count % divisor == 0]
    divisors = {unit * divisor for each in small for divisor in (each, count // each)}
    return min(sorted(divisors), key=lambda divisor: max(divisor / wanted, wanted / divisor))


class _Batches:
    """Batches and optimizer steps of a trainer that is about to begin or to go on; an epoch's last step may have fewer
    batches than the others."""

    def __init__(self, trainer: L.Trainer) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        self.done = progress.total.ready
        self.per_epoch = int(trainer.num_training_batches)
        self._accumulate = trainer.accumulate_grad_batches
        # Where the epoch began that goes on.
        self._first_batch = self.done - progress.current.ready
        self._first_step = trainer.global_step - self._steps(progress.current.ready)

    def at(self, step: int) -> int:
        """Batches that have been read when a step is done."""
        epochs, steps = divmod(step - self._first_step, self._steps(self.per_epoch))
        return self._first_batch + epochs * self.per_epoch + steps * self._accumulate

    def step_at(self, batch: int) -> int:
        """Steps that are done when as many batches have been read."""
        return self._first_step + self._steps(batch - self._first_batch)

    def _steps(self, batches: int) -> int:
        epochs, rest = divmod(batches, self.per_epoch)
        return epochs * math.ceil(self.per_epoch / self._accumulate) + rest // self._accumulate


def _validates(trainer: L.Trainer) -> bool:
    """Whether there is something to validate with, and no `StopAfter`, whose stop is validated."""
    is_stopped = any(step <= trainer.max_steps for step in stops(trainer))
    has_data = trainer.val_dataloaders is None or sum(trainer.num_val_batches) > 0
    return trainer.enable_validation and has_data and not is_stopped
