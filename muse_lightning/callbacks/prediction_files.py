"""Writes what `muse predict` computes: the log-likelihood of every token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file


class PredictionFiles(BasePredictionWriter):
    """One safetensors file per batch and rank: whatever tensors the prediction step returned.

    A language model returns `log_likelihood`, float32 [B, N], natural logarithm, 0 where there is no label, and
    `labels`, int64 [B, N], in stored order of the blocks.

    Args:
        folder: where the files go, named batch=N_rank=R.safetensors.

    Example:
        >>> trainer = L.Trainer(callbacks=[PredictionFiles("predictions")])  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Only rank 0 is sure to know the folder of the run.
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in prediction.items()}
        save_file(tensors, self.folder / f"batch={batch_idx:06d}_rank={trainer.global_rank}.safetensors")
