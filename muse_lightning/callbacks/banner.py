"""What a fit is about to do, in a few lines."""

import sys
from collections.abc import Iterator
from datetime import timedelta

import lightning as L
import torch

from muse_lightning.attention import Dense, describe_layers
from muse_lightning.callbacks.last_validation import unvalidated_end
from muse_lightning.callbacks.stop_after import last_step
from muse_lightning.errors import UserError
from muse_lightning.measure.device_peak import half_precision_peak
from muse_lightning.measure.flops import attention_flops_per_token, training_flops_per_token
from muse_lightning.measure.info import attention_kernels, devices
from muse_lightning.training.memory import PHASES, step_memory
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.recipe_report import shown
from muse_lightning.training.totals import ranks_per_block

ASSUMED_UTILISATION = 0.4
"""MFU by which the expected time is reckoned; the progress display knows better after the first steps."""


class Banner(L.Callback):
    """Prints what runs where before the first step: model, attention, work, memory, data, steps, expected time.

    Example:
        >>> trainer = L.Trainer(callbacks=[Banner()])
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print it, on one rank."""
        assert isinstance(pl_module, LanguageModel)
        if trainer.is_global_zero:
            print("\n".join(banner(trainer, pl_module)), file=sys.stderr, flush=True)


def banner(trainer: L.Trainer, module: LanguageModel) -> list[str]:
    """The lines, each `name: what`."""
    data = getattr(trainer, "datamodule", None)
    batch_size, seq_len = getattr(data, "batch_size", None), getattr(data, "seq_len", None)
    lines = [*_model(trainer, module), *_devices(trainer)]
    if batch_size is None or seq_len is None:
        return lines
    has_documents = bool(getattr(data, "document_mask", False))
    readers = trainer.world_size // ranks_per_block(trainer)
    tokens = batch_size * seq_len * trainer.accumulate_grad_batches * readers
    flops = training_flops_per_token(module.llama, [seq_len], has_documents=has_documents)
    dense = training_flops_per_token(module.llama, [seq_len], [Dense(0)])
    documents = "documents told apart" if has_documents else "a row is one document"
    lines.append(f"context: {seq_len:,} tokens, {batch_size} rows per device and micro-batch; {documents}")
    attention = attention_flops_per_token(module.llama, [seq_len], has_documents=has_documents)
    share = f"{attention / flops:.0%} of it attention; in all {flops / dense:.0%} of exact attention's"
    lines.append(f"work: {flops:.2e} FLOPs per token at a context of one document, {share}")
    lines += [*_memory(trainer, module, batch_size, seq_len), *_data(trainer, tokens), *_steps(trainer, tokens, flops)]
    return lines


def _model(trainer: L.Trainer, module: LanguageModel) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in module.llama.parameters())
    source = trainer.ckpt_path or module.weights
    weights = f"from {source}" if source else "fresh weights"
    yield f"model: {parameters:,} parameters, {module.config.num_hidden_layers} layers, {weights}"
    strategies = [block.self_attn.attention for block in module.llama.blocks]
    kernels = attention_kernels()
    kind = kernels["exact"] if all(type(strategy) is Dense for strategy in strategies) else kernels["muse"]
    around = "compiled" if module.compiled else "not compiled"
    yield f"attention: {describe_layers(strategies)}, by {kind}; around it {around}; {_kept(module)}"


def _kept(module: LanguageModel) -> str:
    changed = {"recompute_every": 1, "mlp_tiles": 1, "offload": False}
    options = {"recompute": module.recompute} | {
        name: getattr(module, name) for name, default in changed.items() if getattr(module, name) != default
    }
    return ", ".join(f"{name}={str(value).lower()}" for name, value in options.items())


def _devices(trainer: L.Trainer) -> Iterator[str]:
    found = devices()
    used = found[trainer.strategy.root_device.index or 0] if torch.cuda.is_available() else found[0]
    yield f"device: {trainer.world_size} x {used}, precision {trainer.precision}"


def _memory(trainer: L.Trainer, module: LanguageModel, batch_size: int, seq_len: int) -> Iterator[str]:
    try:
        needed = step_memory(
            module,
            batch_size=batch_size,
            seq_len=seq_len,
            accumulate=trainer.accumulate_grad_batches,
            precision=trainer.precision,
            device_type="cuda" if trainer.strategy.root_device.type == "cuda" else "cpu",
        )
    except UserError as error:
        # It may train all the same.
        yield f"memory: {error}"
        return
    when = f"at the peak, in the {PHASES[needed.phase]}"
    yield f"memory: about {shown(needed.total)} per device {when}; nothing sharded"


def _data(trainer: L.Trainer, tokens_per_step: int) -> Iterator[str]:
    datasets = getattr(trainer.datamodule, "datasets", None)  # type: ignore[attr-defined]
    if not datasets:
        return
    total = sum(dataset.card.splits["train"].tokens for dataset in datasets)
    names = ", ".join(dataset.name for dataset in datasets)
    epochs = tokens_per_step * max(0, last_step(trainer)) / total
    yield f"data: {names}, {total:,} training tokens, {epochs:.2f} epochs of them"


def _steps(trainer: L.Trainer, tokens: int, flops_per_token: float) -> Iterator[str]:
    first, last = trainer.global_step, last_step(trainer)
    steps = last - first
    yield f"steps: {first:,} to {last:,}, {tokens:,} tokens each, {steps * tokens:,} in all"
    validation = unvalidated_end(trainer)
    if validation is not None:
        yield validation
    device = trainer.strategy.root_device
    peak = half_precision_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is not None:
        seconds = steps * tokens * flops_per_token / (peak * ASSUMED_UTILISATION * trainer.world_size)
        about = timedelta(seconds=round(seconds))
        yield f"time: about {about} at {ASSUMED_UTILISATION:.0%} of the peak, without validation"
