"""Tokens per second and model FLOPs utilisation of each device."""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import Throughput
from torch import Tensor

from muse_lightning.attention import Dense
from muse_lightning.data.batches import document_lengths
from muse_lightning.measure.device_peak import half_precision_peak
from muse_lightning.measure.flops import attention_flops_per_token, training_flops_per_token
from muse_lightning.training.log_step import ends_step, is_log_step
from muse_lightning.training.module import LanguageModel

_WORK: dict[str, tuple[Callable[..., float], list[Dense] | None]] = {
    "mfu": (training_flops_per_token, None),
    "mfu_attention": (attention_flops_per_token, None),
    "mfu_dense_equivalent": (training_flops_per_token, [Dense(0)]),
}
"""What each counts, and with which attention; None is the model's own."""


class DeviceThroughput(L.Callback):
    """Logs `throughput/device/{tokens_per_sec,mfu,mfu_attention,mfu_dense_equivalent}` of the steps since the last log.

    `mfu` counts the work that was really done: the documents as they were packed and the pairs that the attention
    strategy computed. `mfu_attention` is the part of it that those pairs are; the rest is products with weights.
    `mfu_dense_equivalent` counts what dense attention would have had to do in that time: over 1 is a speed that dense
    attention cannot reach on this device. Recomputation is no work in any. They appear where the device's peak is known
    (measure/device_peak.py) and the precision is bf16 or fp16. Time in validation is left out.

    Example:
        >>> trainer = L.Trainer(callbacks=[DeviceThroughput()])
    """

    def __init__(self) -> None:
        self._rates: dict[str, Throughput] = {}
        self._tokens = self._rows = self._batches = 0
        self._unread: list[tuple[int, int, Tensor | None]] = []
        self._started = self._paused = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        peak = _peak(trainer)
        # A window of two updates: from one log to the next.
        self._rates = {name: Throughput(available_flops=peak, window_size=2) for name in _WORK}
        self._tokens = self._rows = self._batches = 0
        self._unread = []
        self._started = time.perf_counter()
        for rate in self._rates.values():
            rate.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        _wait_for_device(trainer)
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the clock go on."""
        self._started += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count the batch; log at the end of an optimizer step that is logged."""
        rows, seq_len = batch["input_ids"].shape
        self._batches += 1
        self._rows += rows
        self._tokens += rows * seq_len
        self._unread.append((rows, seq_len, batch.get("cu_seqlens")))
        if not (ends_step(trainer) and is_log_step(trainer, trainer.global_step)):
            return
        assert isinstance(pl_module, LanguageModel)
        _wait_for_device(trainer)
        elapsed = time.perf_counter() - self._started
        # Read here and not batch by batch: it waits for the device.
        lengths = [length for unread in self._unread for length in document_lengths(*unread)]
        has_documents = any(cu_seqlens is not None for *_, cu_seqlens in self._unread)
        self._unread = []
        metrics = {}
        for name, (flops_per_token, strategies) in _WORK.items():
            flops = flops_per_token(pl_module.llama, lengths, strategies, has_documents=has_documents) * sum(lengths)
            rate = self._rates[name]
            rate.update(
                time=elapsed, batches=self._batches, samples=self._rows, lengths=self._tokens, flops=round(flops)
            )
            computed = rate.compute()
            metrics["throughput/device/tokens_per_sec"] = computed["device/items_per_sec"]
            if "device/mfu" in computed:
                metrics[f"throughput/device/{name}"] = computed["device/mfu"]
        pl_module.log_dict(metrics)


def _peak(trainer: L.Trainer) -> float | None:
    device = trainer.strategy.root_device
    if device.type != "cuda" or str(trainer.precision) not in ("bf16-mixed", "bf16-true", "16-mixed", "16-true"):
        return None
    return half_precision_peak(torch.cuda.get_device_name(device))


def _wait_for_device(trainer: L.Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
