"""Which curves TensorBoard draws into one chart, on its page "Custom Scalars"."""

import re

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from muse_lightning.callbacks.context_gain import ContextGain
from muse_lightning.callbacks.context_warmup import ContextWarmup
from muse_lightning.callbacks.future_gain import FutureGain
from muse_lightning.callbacks.identifier_recall import IdentifierRecall
from muse_lightning.callbacks.needle_retrieval import NeedleRetrieval
from muse_lightning.training.trainer_callbacks import callbacks_of

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "loss": {
        "training and validation, nats": ("train/loss", "val/loss", "val/loss_exact"),
        "validation by context, nats": ("val/loss_short", "val/loss_long"),
        "validation by tokens in sight, nats": ("val/loss_by_position/*",),
        "validation, bits per byte": ("val/bpb", "baseline/unigram_bpb", "baseline/bigram_bpb"),
        "validation, perplexity": ("val/ppl",),
    },
    "optimizer": {
        "learning rate": ("lr-*",),
        "gradient norm": ("train/grad_norm",),
        "steps skipped": ("train/skipped_steps", "train/consecutive_skipped_steps"),
        "tokens": ("train/tokens",),
        "tokens in a piece": ("train/context",),
    },
    "speed": {
        "tokens per second and device": ("throughput/device/tokens_per_sec",),
        "model FLOPs utilisation": ("throughput/device/mfu*",),
        "seconds per step": ("time/*",),
        "memory, GiB": ("memory/*",),
    },
    "attention": {
        "relative squared error": ("muse/relative_error*",),
        "exact key-value heads": ("muse/exact_heads_layer_*",),
        "gain from sight of the future, nats per token": ("val/future_gain*",),
    },
    "far context": {
        "gain, nats per token": ("val/context_gain", "val/needle_gain"),
        "needles found": ("val/needle_accuracy_*",),
        "needle rows": ("val/needle_rows",),
        "names recalled": ("val/identifier_accuracy*",),
        "names, nats": ("val/identifier_nats*",),
        "names counted": ("val/identifier_count*",),
    },
}
"""Category -> chart -> its tags, where * is any text."""

LONG_CONTEXT_CALLBACKS = (ContextGain, NeedleRetrieval, IdentifierRecall)
"""What logs the tags of the last category; `muse validate` has them too. They take forward passes of their own."""


class ScalarLayout(L.Callback):
    """Writes `CHARTS` once for each start, those that this run has something for: TensorBoard draws the others empty.

    Example:
        >>> trainer = L.Trainer(callbacks=[ScalarLayout()])
    """

    def __init__(self) -> None:
        self._is_written = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it."""
        self._write(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it, of a validation without a fit."""
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        if self._is_written or not trainer.is_global_zero:
            return
        self._is_written = True
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(_layout(trainer))


def _layout(trainer: L.Trainer) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """As torch.utils.tensorboard takes it."""
    left_out = set()
    if not callbacks_of(trainer, *LONG_CONTEXT_CALLBACKS):
        left_out |= set(CHARTS["far context"])
    if not callbacks_of(trainer, FutureGain):
        left_out.add("gain from sight of the future, nats per token")
    if not callbacks_of(trainer, ContextWarmup):
        left_out.add("tokens in a piece")
    if not trainer.training or not getattr(trainer.lightning_module, "partly_exact", ()):
        left_out.add("exact key-value heads")
    if trainer.strategy.root_device.type != "cuda":
        left_out.add("model FLOPs utilisation")
    if not trainer.training:
        left_out |= {*CHARTS["optimizer"], *CHARTS["speed"]}
    layout = {
        category: {
            title: ("Multiline", [_pattern(tag) for tag in tags])
            for title, tags in charts.items()
            if title not in left_out
        }
        for category, charts in CHARTS.items()
    }
    return {category: charts for category, charts in layout.items() if charts}


def _pattern(tag: str) -> str:
    # TensorBoard matches from the beginning of a tag, not to its end.
    return f"^{re.escape(tag).replace(re.escape('*'), '.*')}$"
