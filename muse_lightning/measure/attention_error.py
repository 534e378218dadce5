"""How far a model's attention is from exact attention, layer by layer, on the activations of a real batch."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from muse_lightning.attention import exact_attention
from muse_lightning.attention.partly_exact import PartlyExact
from muse_lightning.model.llama import Llama


def relative_squared_error(out: Tensor, exact: Tensor) -> Tensor:
    """Sum of squared differences over the sum of squares of `exact`, float32 (float64 for float64): a scalar."""
    dtype = torch.float64 if exact.dtype == torch.float64 else torch.float32
    out, exact = out.to(dtype), exact.to(dtype)
    return (out - exact).square().sum() / exact.square().sum()


@torch.no_grad()
def attention_errors(model: Llama, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Relative squared error of each layer's attention output against exact attention on the same q, k and v.

    Args:
        model: called once, as its own attention leaves the activations. Exact is what its configuration means: with a
            sliding_window, attention to that.
        input_ids: int64 [B, N]. cu_seqlens: int32 over the flattened tokens, or None.
    Returns:
        [num_layers]; 0 for exact attention.
    """
    errors: list[Tensor] = []
    exact_strategy = exact_attention(model.config.sliding_window)(0)

    def compare(strategy: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], out: Tensor) -> None:
        exact = exact_strategy(*inputs, **options)
        errors.append(relative_squared_error(out, exact))

    # Not every strategy among the modules: one may be made of others.
    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.self_attn.attention.register_forward_hook(compare, with_kwargs=True))
        model.hidden_states(input_ids, cu_seqlens=cu_seqlens)
    return torch.stack(errors)


def partly_exact(model: Llama) -> list[PartlyExact]:
    """What attends in layers of which some heads are exact, in order."""
    strategies = (block.self_attn.attention for block in model.blocks)
    return [strategy for strategy in strategies if isinstance(strategy, PartlyExact)]


@torch.no_grad()
def errors_by_head(model: Llama, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Relative squared error by key-value head that layers of which some heads are exact would have without these.

    Args:
        model, input_ids, cu_seqlens: as for `attention_errors`.
    Returns:
        [layers, num_kv_heads] of those of `partly_exact`. A head's outputs are those of all query heads that share it;
        where exact ones are 0, the error is 0.
    """
    errors: list[Tensor] = []

    def compare(strategy: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        assert isinstance(strategy, PartlyExact)
        outs = (
            attend(*inputs, **options).chunk(strategy.num_kv_heads, 1) for attend in (strategy.others, strategy.exact)
        )
        # One head after the other: they are compared in float32.
        pairs = zip(*outs, strict=True)
        errors.append(torch.stack([relative_squared_error(out, exact).where(exact.any(), 0.0) for out, exact in pairs]))

    with ExitStack() as hooks:
        for strategy in partly_exact(model):
            hooks.enter_context(strategy.register_forward_pre_hook(compare, with_kwargs=True))
        model.hidden_states(input_ids, cu_seqlens=cu_seqlens)
    return torch.stack(errors)
