"""Optimizer steps of a recipe, by Lightning's own loop, timed."""

import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from muse_lightning.callbacks.step_time import Mark
from muse_lightning.data.batches import Batch
from muse_lightning.errors import UserError
from muse_lightning.speed.batches import repeated
from muse_lightning.training.log_step import ends_step
from muse_lightning.training.module import LanguageModel

# Options of a recipe's trainer that a step depends on.
_OF_THE_STEP = ("accelerator", "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


@dataclass(frozen=True)
class Steps:
    """What some optimizer steps took.

    Attributes:
        seconds: Of each, on the device's own time line.
        peak_bytes: Memory in use at most, of everything; None on a CPU.
    """

    seconds: Sequence[float]
    peak_bytes: int | None


class _StepClock(L.Callback):
    """Marks the end of every optimizer step."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer):
            self.marks.append(Mark(trainer.strategy.root_device))


def time_steps(
    model: LanguageModel,
    trainer_options: dict[str, Any],
    batch: Batch,
    warmup: int,
    steps: int,
    callbacks: Sequence[L.Callback] = (),
) -> Steps:
    """Train on one batch again and again, and time all but the first steps.

    Args:
        model: as a recipe makes it; trained in place.
        trainer_options: those of the recipe's trainer.
        warmup: steps before the first that is timed: compilation, the allocator's first blocks, the optimizer's state.
        steps: steps that are timed.
        callbacks: called as well.
    Raises:
        torch.OutOfMemoryError: it does not fit.
        UserError: there is nothing to time.
    """
    if warmup < 1 or steps < 1:
        raise UserError(f"warmup and steps must be at least 1, found {warmup} and {steps}")
    clock = _StepClock()
    options = {name: trainer_options[name] for name in _OF_THE_STEP if name in trainer_options}
    trainer = L.Trainer(
        **options,
        devices=1,
        max_steps=warmup + steps,
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    has_gpu = trainer.strategy.root_device.type == "cuda"
    if has_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    accumulated = trainer_options.get("accumulate_grad_batches", 1)
    trainer.fit(model, train_dataloaders=repeated(batch, (warmup + steps) * accumulated))
    marks = clock.marks[warmup - 1 :]
    seconds = [before.seconds_until(after) for before, after in itertools.pairwise(marks)]
    return Steps(seconds, torch.cuda.max_memory_allocated() if has_gpu else None)
