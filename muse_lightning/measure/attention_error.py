"""How far a model's attention is from exact attention, layer by layer, on the activations of a real batch."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm

from muse_lightning.attention import exact_attention
from muse_lightning.attention.partly_exact import PartlyExact
from muse_lightning.model.llama import Llama, SelfAttention


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


def squares_added(attention: SelfAttention, out: Tensor, groups: int) -> Tensor:
    """Squared norm of what attention's result adds to the residual stream, each group of heads alone.

    Args:
        attention: whose output projection is meant, without its bias.
        out: [B, H, N, D].
        groups: into how many groups of neighbours the heads are parted: num_kv_heads, or 1 for all heads together.
    Returns:
        float32 (float64 for float64) [groups].
    """
    parts = out.transpose(1, 2).flatten(2).chunk(groups, 2), attention.o_proj.weight.chunk(groups, 1)
    added = (F.linear(part, weight) for part, weight in zip(*parts, strict=True))
    # Unlike squares in float32, this makes no copy.
    return torch.stack([vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in added]).square()


@torch.no_grad()
def errors_by_head(model: Llama, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """What key-value heads would do wrong in layers of which some heads are exact, if these were not.

    Where it was measured, this found the one head whose approximation cost the loss most, by far, and agreed with the
    others' cost better than the relative squared error of their outputs does; both put the first layer too low
    (benchmarks/results/2026-11-30_h200_exact-heads.md).

    Args:
        model, input_ids, cu_seqlens: as for `attention_errors`.
    Returns:
        float32 (float64 for float64) [layers, num_kv_heads], layers as in `partly_exact`: squared norm of what the
        error of a head adds to the residual stream, over that of what exact attention of all heads of its layer adds;
        0 where that is 0.
    """
    errors: list[Tensor] = []

    def compare(
        attention: SelfAttention, strategy: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]
    ) -> None:
        assert isinstance(strategy, PartlyExact)
        exact = strategy.exact(*inputs, **options)
        wrong = strategy.others(*inputs, **options) - exact
        lost, added = squares_added(attention, wrong, strategy.num_kv_heads), squares_added(attention, exact, 1)
        errors.append((lost / added).where(added != 0, 0.0))  # what is not a number stays so

    with ExitStack() as hooks:
        for attention in (block.self_attn for block in model.blocks):
            if isinstance(attention.attention, PartlyExact):
                hook = partial(compare, attention)
                hooks.enter_context(attention.attention.register_forward_pre_hook(hook, with_kwargs=True))
        model.hidden_states(input_ids, cu_seqlens=cu_seqlens)
    return torch.stack(errors)
