"""How well the approximation holds while the model learns: the error of its attention against exact attention."""

from typing import Any

import lightning as L
from torch import Tensor

from muse_lightning.measure.attention_error import attention_errors
from muse_lightning.training.module import LanguageModel


class AttentionError(L.Callback):
    """Logs `muse/relative_error`, the mean over layers, and each layer's, on the first batch of each validation.

    The relative squared error of attention outputs is that of docs/attention.md, "Error measured". Exact attention, to
    `config.sliding_window` where there is one, has none, and nothing is logged for it.

    Example:
        >>> trainer = L.Trainer(callbacks=[AttentionError()])
    """

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the model once more on the first batch, and compare."""
        assert isinstance(pl_module, LanguageModel)
        if batch_idx > 0 or pl_module.attends_exactly:
            return
        # Callbacks run outside the precision that the step ran in.
        with trainer.precision_plugin.forward_context():
            errors = attention_errors(pl_module.llama, batch["input_ids"], batch.get("cu_seqlens"))
        tags = {f"muse/relative_error_layer_{layer}": error for layer, error in enumerate(errors)}
        pl_module.log_dict(tags | {"muse/relative_error": errors.mean()}, on_epoch=True, sync_dist=True, batch_size=1)
