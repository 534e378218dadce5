"""The end of a training with exact attention."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from muse_lightning.attention import exact_attention
from muse_lightning.errors import UserError
from muse_lightning.training.module import LanguageModel


class ExactTail(L.Callback):
    """Switches every layer to exact attention for the last steps.

    The state dict is the same, so that the optimizer and its moments go on. A run that is resumed in its tail goes on
    there.

    Args:
        fraction: the tail as a part of trainer.max_steps; at least the last step.
    Raises:
        UserError: fraction is not above 0 and below 1.
    Source: MoBA (arXiv 2502.13189), section 3.2, trains the last tenth of its tokens with full attention.

    Example:
        >>> trainer = L.Trainer(callbacks=[ExactTail(fraction=0.1)])
    """

    def __init__(self, fraction: float = 0.1) -> None:
        if not 0 < fraction < 1:
            raise UserError(f"ExactTail: fraction is {fraction}; accepted: above 0 and below 1")
        self.fraction = fraction

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> Any:
        """Switch, where the tail begins."""
        assert isinstance(pl_module, LanguageModel)
        if pl_module.attends_exactly or trainer.global_step < self.first_step(trainer.max_steps):
            return
        pl_module.llama.set_attention(exact_attention(pl_module.config.sliding_window))
        rank_zero_info(f"step {trainer.global_step}: exact attention from here on")

    def first_step(self, max_steps: int) -> int:
        """The first optimizer step, counted from 0, of the tail."""
        return min(max_steps - 1, round((1 - self.fraction) * max_steps))
