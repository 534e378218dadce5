"""Progress of a run for people: a bar on a terminal, plain lines in a log file."""

import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from muse_lightning.callbacks.stop_after import last_step


class ProgressLines(ProgressBar):
    """One line per interval of training, and one per validation: for log files, where a bar would be noise.

    Args:
        interval_seconds: time between two lines of training; the first and the last step always get one.

    Example:
        >>> trainer = L.Trainer(callbacks=[ProgressLines(interval_seconds=60)])  # doctest: +SKIP
    """

    def __init__(self, interval_seconds: float = 10.0) -> None:
        super().__init__()
        self.interval_seconds = interval_seconds
        self._enabled = True
        self._started = self._printed = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Print nothing; called on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = time.monotonic()
        self._printed = float("-inf")
        self._first_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # At the start of the next batch, because the module logs a step after callbacks have seen its end.
        now = time.monotonic()
        if trainer.global_step > self._first_step and now - self._printed >= self.interval_seconds:
            self._printed = now
            self._print(self._training_line(trainer, now))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print(self._training_line(trainer, time.monotonic()))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._print(f"step {trainer.global_step}  " + _figures(trainer, "val/"))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print(_figures(trainer, "test/"))

    def _training_line(self, trainer: L.Trainer, now: float) -> str:
        step, last = trainer.global_step, last_step(trainer)
        parts = [f"step {step}/{last}" if last > 0 else f"step {step}", _figures(trainer, "train/loss")]
        rate = trainer.callback_metrics.get("throughput/device/tokens_per_sec")
        if rate is not None:
            parts.append(f"{float(rate):,.0f} tokens/s per device")
        done = step - self._first_step
        if last > step and done > 0:
            parts.append(f"left {timedelta(seconds=round((now - self._started) / done * (last - step)))}")
        return "  ".join(part for part in parts if part)

    def _print(self, line: str) -> None:
        if self._enabled:
            print(line, flush=True)


def progress_bar() -> ProgressBar:
    """The progress bar for where the output goes: rich's on a terminal (it honours NO_COLOR), lines elsewhere."""
    return RichProgressBar() if sys.stdout.isatty() else ProgressLines()


def _figures(trainer: L.Trainer, prefix: str) -> str:
    found = {name: value for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
    return "  ".join(
        f"{name} {float(value):.4f}" for name, value in found.items() if not name.endswith(("_step", "_epoch"))
    )
