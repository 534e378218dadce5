"""What strategies make of the q, k and v that exact attention leaves in a model: errors and softmax mass, by head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muse_kernels import muse_mass
from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.compare.settings import Setting
from muse_lightning.data.batches import Batch, to_device
from muse_lightning.model.llama import Llama


@dataclass(frozen=True)
class Activations:
    """One layer's input to attention, and what exact attention makes of it: q, out [B, H, N, D]; k, v [B, T, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Mapping[str, Any]
    """softmax_scale and cu_seqlens."""
    out: Tensor
    layer: int


@dataclass
class OnActivations:
    """Found for one setting, means over batches.

    Attributes:
        errors: float64 [layers, heads]: relative squared error of attention's output against exact attention.
        mass: float64 [layers, heads, 3]: shares of softmax mass near, in retrieved keys and in summaries, mean over
            queries; None where it is not measured.
    """

    errors: Tensor
    mass: Tensor | None


@torch.no_grad()
def on_activations(
    llama: Llama, batches: Sequence[Batch], settings: Sequence[Setting], with_mass: Sequence[str]
) -> dict[str, OnActivations]:
    """Run the model as it is, and beside each of its layers every strategy on that layer's q, k and v.

    Args:
        llama: with exact attention.
        batches: on any device.
        settings: what to compare.
        with_mass: names of the settings, all of MuSe's operator, whose mass is measured as well; slow.
    """
    heads, layers = llama.config.num_attention_heads, llama.config.num_hidden_layers
    errors = {setting.name: torch.zeros(layers, heads, dtype=torch.float64) for setting in settings}
    mass = {name: torch.zeros(layers, heads, 3, dtype=torch.float64) for name in with_mass}
    for batch in batches:
        for layer, found in enumerate(_layers(llama, batch)):
            exact = found.out.double().square().sum((0, 2, 3))
            for setting in settings:
                out = setting.attention(layer)(found.q, found.k, found.v, **found.options)
                difference = (out.float() - found.out.float()).square().sum((0, 2, 3), dtype=torch.float64)
                errors[setting.name][layer] += (difference / exact).cpu() / len(batches)
                if setting.name in mass and setting.muse is not None:
                    shares = muse_mass(found.q, found.k, **found.options, **setting.muse)
                    means = torch.stack([share.mean((0, 2), dtype=torch.float64) for share in shares], dim=-1)
                    mass[setting.name][layer] += means.cpu() / len(batches)
    return {name: OnActivations(errors[name], mass.get(name)) for name in errors}


def middle_layer(llama: Llama, batch: Batch) -> Activations:
    """The activations of the layer in the middle."""
    with torch.no_grad():
        return next(
            found for layer, found in enumerate(_layers(llama, batch)) if layer == llama.config.num_hidden_layers // 2
        )


def _layers(llama: Llama, batch: Batch) -> Iterator[Activations]:
    """The activations of each layer in turn; those of one layer alone exist at once."""
    x, *rest = _first_inputs(llama, batch)
    for block in llama.blocks:
        with _attention_recorded(block.self_attn.attention) as found:
            x = block(x, *rest)
        yield found.pop()


def _first_inputs(llama: Llama, batch: Batch) -> tuple[Any, ...]:
    """What the first block is given."""
    found: list[tuple[Any, ...]] = []
    hook = llama.blocks[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs))
    try:
        moved = to_device(batch, llama.lm_head.weight.device)
        llama.hidden_states(moved["input_ids"], cu_seqlens=moved.get("cu_seqlens"))
    finally:
        hook.remove()
    return found[0]


@contextmanager
def _attention_recorded(strategy: AttentionStrategy) -> Iterator[list[Activations]]:
    found: list[Activations] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], out: Tensor) -> None:
        q, k, v = inputs
        found.append(Activations(q, k, v, options, out, strategy.layer_idx))

    hook = strategy.register_forward_hook(record, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()
