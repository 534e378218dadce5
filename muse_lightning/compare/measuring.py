"""All measurements of a comparison, in their order."""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from muse_lightning.compare import costs
from muse_lightning.compare.activations import OnActivations, middle_layer, on_activations
from muse_lightning.compare.blocks import Blocks
from muse_lightning.compare.exact_heads import with_chosen_heads
from muse_lightning.compare.gradients import gradient_cosines
from muse_lightning.compare.losses import Losses, losses
from muse_lightning.compare.results import Found
from muse_lightning.compare.settings import Setting
from muse_lightning.measure.bench.timing import Instruments
from muse_lightning.model.llama import Llama


def measure(
    llama: Llama,
    blocks: Blocks,
    settings: Sequence[Setting],
    *,
    detailed_blocks: int,
    gradients: bool,
    loss_chunk: int,
    instruments: Instruments | None,
) -> list[Found]:
    """Measure every setting, exact attention, which comes first, before the others.

    Args:
        llama: with exact attention, where it shall run.
        detailed_blocks: blocks on which errors and mass are measured.
        gradients: whether gradients are compared, where there is memory for two of them.
        loss_chunk: tokens whose logits exist at once.
        instruments: None: nothing is timed.
    Raises:
        UserError: a loss is not finite. torch.OutOfMemoryError: there is no memory for the forward pass.
    """
    exact, num_layers = settings[0], llama.config.num_hidden_layers
    exact_pairs = costs.pairs(exact, blocks.batches, num_layers)
    muse = [setting for setting in settings if setting.muse is not None]
    if all(costs.pairs(setting, blocks.batches, num_layers) == exact_pairs for setting in muse):
        _say("every MuSe setting attends these blocks exactly: their rows, or documents, are too short for it")
    if any(setting.exact_heads for setting in settings):
        _say("heads that are exact")
        settings = with_chosen_heads(llama, blocks.other, settings)
    main = [setting for setting in settings if not setting.is_swept]
    by_name = _losses(llama, blocks, settings, loss_chunk)
    _say("error and mass of each head")
    with_mass = [setting.name for setting in main if setting.muse is not None]
    detailed = on_activations(llama, blocks.batches[:detailed_blocks], settings[1:], with_mass)
    attention_ms, forward_ms = _times(llama, blocks, settings, main, instruments)
    cosines = _cosines(llama, blocks, main, loss_chunk) if gradients else {}
    return [
        Found(
            setting,
            by_name[setting.name],
            by_name[setting.name].rise(by_name[exact.name]),
            costs.pairs(setting, blocks.batches, num_layers) / exact_pairs,
            gradient_cosine=cosines.get(setting.name),
            attention_ms=attention_ms.get(setting.name),
            forward_ms=forward_ms.get(setting.name),
            **_as_lists(detailed.get(setting.name)),
        )
        for setting in settings
    ]


def _losses(llama: Llama, blocks: Blocks, settings: Sequence[Setting], loss_chunk: int) -> dict[str, Losses]:
    found = {}
    for setting in settings:
        with llama.attention_as(setting.attention):
            found[setting.name] = losses(llama, blocks, loss_chunk)
        _say(f"{setting.name}: loss {found[setting.name].mean:.4f}")
    return found


def _times(
    llama: Llama, blocks: Blocks, settings: Sequence[Setting], main: Sequence[Setting], instruments: Instruments | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a layer's attention and of the model's forward pass, by setting."""
    if instruments is None:
        return {}, {}
    _say("times")
    middle = middle_layer(llama, blocks.batches[0])
    attention = costs.attention_times(settings, middle, instruments, llama.config.num_hidden_layers)
    forward = costs.forward_times(llama, main, blocks.batches[0], instruments)
    return attention, {name: timing.median_ms for name, timing in forward.items()}


def _cosines(llama: Llama, blocks: Blocks, main: Sequence[Setting], loss_chunk: int) -> dict[str, float]:
    _say("gradients")
    try:
        return gradient_cosines(llama, blocks.batches[0], main[0], main[1:], loss_chunk)
    except torch.OutOfMemoryError:
        _say("gradients are left out: no memory for two of them")
        return {}


def _as_lists(found: OnActivations | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {"errors": found.errors.tolist(), "mass": None if found.mass is None else found.mass.tolist()}


def _say(what: str) -> None:
    print(f"compare: {what}", file=sys.stderr, flush=True)
