"""Where the time of a training step goes."""

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from muse_lightning.training.log_step import ends_step, is_log_step

PHASES = ("data", "forward", "backward", "optimizer")


class StepTime(L.Callback):
    """Logs `time/{step,data,forward,backward,optimizer}`, seconds per optimizer step, averaged since the last log.

    `data` is what lies between two batches: the wait for the next one, and a checkpoint where one is saved meanwhile.
    `optimizer` includes gradient clipping; the micro-batches of a step add up. `step` is everything but validation. On
    a GPU the times are those of the device's own queue, taken by events, so that measuring does not make the host wait.

    Example:
        >>> trainer = L.Trainer(callbacks=[StepTime()])
    """

    def __init__(self) -> None:
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._steps = 0
        self._mark: Mark | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start waiting for data."""
        self._spans, self._steps = [], 0
        self._mark = Mark(trainer.strategy.root_device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the time since the last training batch."""
        self._mark = Mark(trainer.strategy.root_device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        self._end("data", trainer)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The loss is there."""
        self._end("forward", trainer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The gradients are there."""
        self._end("backward", trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The weights are updated, unless gradients are accumulated; log what has gathered if this step is logged."""
        if not ends_step(trainer):
            self._end("other", trainer)
            return
        self._end("optimizer", trainer)
        self._steps += 1
        if not is_log_step(trainer, trainer.global_step):
            return
        seconds = dict.fromkeys(("step", *PHASES), 0.0)
        for phase, start, end in self._spans:
            span = start.seconds_until(end)
            seconds["step"] += span
            if phase in seconds:
                seconds[phase] += span
        pl_module.log_dict({f"time/{phase}": total / self._steps for phase, total in seconds.items()})
        self._spans, self._steps = [], 0

    def _end(self, phase: str, trainer: L.Trainer) -> None:
        assert self._mark is not None
        now = Mark(trainer.strategy.root_device)
        self._spans.append((phase, self._mark, now))
        self._mark = now


class Mark:
    """A moment on a device's time line."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is None:
            self._time = time.perf_counter()
        else:
            self._event.record(torch.cuda.current_stream(device))

    def seconds_until(self, later: "Mark") -> float:
        """Waits until the device has reached the later one."""
        if self._event is None or later._event is None:
            return later._time - self._time
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1000
