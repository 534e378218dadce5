"""A trace of training steps for a browser, and a snapshot of what is in memory."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile

from muse_lightning.training.log_step import ends_step
from muse_lightning.training.module import LanguageModel

TRACE_NAME = "trace.json.gz"
SNAPSHOT_NAME = "memory.pickle"
_MOST_EVENTS = 200_000
"""Allocations that a snapshot remembers."""


class Recorder(L.Callback):
    """Records optimizer steps after the first ones.

    Writes `trace.json.gz` for Perfetto or chrome://tracing and, on a GPU, `memory.pickle` for pytorch.org/memory_viz.

    Args:
        folder: where to write.
        skip: steps before those that are recorded.
    """

    def __init__(self, folder: Path, skip: int) -> None:
        self._folder = folder
        self._skip = skip
        self._steps = 0
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin, where the steps to be recorded begin."""
        if self._profile is not None or self._steps < self._skip:
            return
        activities = [ProfilerActivity.CPU]
        if trainer.strategy.root_device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            # Looking up where an allocation comes from breaks compiled functions that are computed again, since torch
            # 2.11 (pytorch/pytorch#179536): the snapshot then has sizes and times alone.
            is_at_risk = isinstance(pl_module, LanguageModel) and pl_module.compiled and pl_module.recompute != "none"
            torch.cuda.memory._record_memory_history(context=None if is_at_risk else "all", max_entries=_MOST_EVENTS)
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count optimizer steps."""
        self._steps += ends_step(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what was recorded."""
        assert self._profile is not None
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.memory._dump_snapshot(str(self._folder / SNAPSHOT_NAME))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._folder / TRACE_NAME))
