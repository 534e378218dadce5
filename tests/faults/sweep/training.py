"""What is swept: a training by Lightning with DurableCheckpoint that saves after every step and validates.

It takes 50 ms, and what its state must be at every step is known without running it.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO

STEPS = 4
"""Optimizer steps, each with a save, a validation, and the manifest written again with what that measured; in the last
two, a checkpoint is removed."""
RESUMED_STEPS = 6
LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0, 6: 6.0}
"""val/loss by step."""
BEST = 2
SIZE = 80
"""Rows and columns of the weight: 25 kB, several writes."""
MOMENTUM = 0.5
CONFIRMED = "/confirmed/"
"""A path that is looked up, with the step, when the training is told that a checkpoint is on the disk: it shows among
the system calls."""


def expected_state(step: int) -> tuple[float, float]:
    """Every element of the weight and of its momentum after `step` steps of SGD with gradient 1, exact in float32."""
    weight = momentum = 0.0
    for _ in range(step):
        momentum = MOMENTUM * momentum + 1.0
        weight -= momentum
    return weight, momentum


class Descending(L.LightningModule):
    """A weight whose gradient is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE, SIZE))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", LOSSES[self.global_step])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=MOMENTUM)


class Confirming(DurableCheckpoint):
    """Leaves a mark when a checkpoint is said to be on the disk: in `confirmed`, which outlives the process, and among
    the system calls."""

    def __init__(self, confirmed: Any, **options: Any) -> None:
        super().__init__(**options)
        self.confirmed = confirmed

    def _is_on_disk(self, step: int) -> None:
        os.access(f"{CONFIRMED}{step}", os.F_OK)
        self.confirmed[step] = 1
        super()._is_on_disk(step)


def train(folder: Path, io: DurableCheckpointIO, confirmed: Any, max_steps: int, ckpt_path: Path | None) -> None:
    """Train with checkpoints in `folder`.

    Args:
        confirmed: bytes by step, set to 1 when its checkpoint is on the disk.
        ckpt_path: where to go on from.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        val_check_interval=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder.parent,
        plugins=[io],
        callbacks=[
            Confirming(confirmed, dirpath=folder, every_n_minutes=None, is_asynchronous=io.is_asynchronous),
        ],
    )
    batches = torch.utils.data.DataLoader([0] * 2 * RESUMED_STEPS)
    trainer.fit(Descending(), batches, batches, ckpt_path=ckpt_path)
