"""The gradient's norm."""

import lightning as L
from torch.optim import Optimizer

from muse_lightning.training.gradients import gradient_norm
from muse_lightning.training.log_step import is_log_step


class GradientNorm(L.Callback):
    """Logs `train/grad_norm`: the 2-norm of all gradients of an optimizer step, before clipping.

    Example:
        >>> trainer = L.Trainer(callbacks=[GradientNorm()])
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Compute and log it if the step that is about to end is logged."""
        if is_log_step(trainer, trainer.global_step + 1):
            pl_module.log("train/grad_norm", gradient_norm(pl_module))
