"""Memory of the device while training."""

from typing import Any

import lightning as L
import psutil
import torch

from muse_lightning.training.log_step import ends_step, is_log_step

GIB = 1024**3


class MemoryUse(L.Callback):
    """Logs `memory/{allocated,reserved,peak}_gib`.

    On a GPU: what tensors take now, what PyTorch's allocator holds, and the most that tensors took in this process.
    Elsewhere `allocated` is the resident memory of the process and `peak` the largest that was logged; nothing is
    reserved.

    Example:
        >>> trainer = L.Trainer(callbacks=[MemoryUse()])
    """

    def __init__(self) -> None:
        self._peak = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the end of an optimizer step that is logged."""
        if not (ends_step(trainer) and is_log_step(trainer, trainer.global_step)):
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            used = {
                "allocated": torch.cuda.memory_allocated(device),
                "reserved": torch.cuda.memory_reserved(device),
                "peak": torch.cuda.max_memory_allocated(device),
            }
        else:
            resident = psutil.Process().memory_info().rss
            self._peak = max(self._peak, resident)
            used = {"allocated": resident, "peak": self._peak}
        pl_module.log_dict({f"memory/{name}_gib": size / GIB for name, size in used.items()})
