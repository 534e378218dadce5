"""Exact attention of some heads beside another strategy for the others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muse_lightning.attention.base import AttentionStrategy, check_is_whole
from muse_lightning.attention.exact import exact_attention, is_exact
from muse_lightning.errors import UserError

ROUNDING = 1e-4
"""A relative squared error that equal outputs of a layer may have, in parts of which each head has its own: in bfloat16
they are rounded to 2^-9, whose square is 4e-6."""


class PartlyExact(AttentionStrategy):
    """Some key-value heads, each with the query heads that share it, attend exactly, the rest by another strategy.

    Not for recipes, which have `model.exact_heads`. Which heads are exact may change between two steps.

    Args:
        others: the other strategy.
        exact: exact attention, to the model's window where it has one.
        num_kv_heads: of the model.
        heads: key-value heads that are exact, ascending.
    """

    def __init__(
        self, others: AttentionStrategy, exact: AttentionStrategy, num_kv_heads: int, heads: Sequence[int] = ()
    ) -> None:
        super().__init__(others.layer_idx)
        self.others = others
        self.exact = exact
        self.num_kv_heads = num_kv_heads
        self.heads = tuple(heads)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        options = {"softmax_scale": softmax_scale, "cu_seqlens": cu_seqlens}
        return attend_partly_exactly(self.heads, self.exact, self.others, q, k, v, **options)

    def check(self, *, seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        check_is_whole(self.others)
        self.others.check(seq_len=seq_len, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)

    def pairs(self, lengths: Sequence[int], *, has_documents: bool = False) -> float:
        count, total = len(self.heads), self.num_kv_heads
        exact, others = (s.pairs(lengths, has_documents=has_documents) for s in (self.exact, self.others))
        # One division, the last: where both are equal, so is the result.
        return (count * exact + (total - count) * others) / total


def attend_partly_exactly(
    heads: Sequence[int],
    exact: AttentionStrategy,
    others: AttentionStrategy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Any,
) -> Tensor:
    """Attention of which some key-value heads are exact.

    Args:
        heads: these, ascending.
        exact, others: their strategy, and that of the other heads.
        q, k, v, options: as strategies take them.
    Returns:
        as a strategy does.
    """
    num_kv_heads = k.shape[1]
    if len(heads) in (0, num_kv_heads):
        strategy = exact if heads else others
        out: Tensor = strategy(q, k, v, **options)
        return out
    rest = [head for head in range(num_kv_heads) if head not in heads]
    # unbind and cat: their backward passes copy every gradient once.
    groups = [x.unflatten(1, (num_kv_heads, -1)).unbind(1) for x in (q, k, v)]
    outs: dict[int, Tensor] = {}
    for those, strategy in ((heads, exact), (rest, others)):
        some = (torch.cat([group[head] for head in those], dim=1) for group in groups)
        out = strategy(*some, **options)
        outs |= zip(those, out.unflatten(1, (len(those), -1)).unbind(1), strict=True)
    return torch.cat([outs[head] for head in range(num_kv_heads)], dim=1)


def partly_exact_in(
    count: int,
    attention: Callable[[int], AttentionStrategy],
    *,
    exact_layers: set[int],
    num_layers: int,
    num_kv_heads: int,
    window: int | None,
) -> Callable[[int], AttentionStrategy]:
    """`attention`, but `count` key-value heads of the model attend exactly, at first as evenly spread as may be.

    Args:
        count, exact_layers, num_layers, num_kv_heads: as in `spread_heads`, which raises.
        window: as in `exact_attention`.
    Raises:
        UserError: also where heads of `attention` are not known to be alike.
    """
    heads = spread_heads(count, exact_layers=exact_layers, num_layers=num_layers, num_kv_heads=num_kv_heads)
    return exact_heads_in(heads if count else {}, attention, num_kv_heads=num_kv_heads, window=window)


def exact_heads_in(
    heads: Mapping[int, Sequence[int]],
    attention: Callable[[int], AttentionStrategy],
    *,
    num_kv_heads: int,
    window: int | None,
) -> Callable[[int], AttentionStrategy]:
    """`attention`, but some heads attend exactly, in layers that a `PartlyExact` has even where none of its heads does.
    Layers that are exact stay as they are.

    Args:
        heads: by the number of each such layer, its key-value heads that are exact, ascending.
        num_kv_heads: of the model.
        window: as in `exact_attention`.
    """
    exact = exact_attention(window)

    def make(layer: int) -> AttentionStrategy:
        strategy = attention(layer)
        if layer not in heads or is_exact(strategy, window):
            return strategy
        if not strategy.heads_are_alike:
            name = type(strategy).__name__
            raise UserError(
                f"model.exact_heads: {name} does not say that it attends every head alike; accepted with it: 0, or "
                f"heads_are_alike = True in {name}"
            )
        return PartlyExact(strategy, exact(layer), num_kv_heads, heads[layer])

    return make


def spread_heads(
    count: int, *, exact_layers: set[int], num_layers: int, num_kv_heads: int, option: str = "model.exact_heads"
) -> dict[int, tuple[int, ...]]:
    """`count` key-value heads of a model, as evenly spread as may be: those of each layer that is not exact.

    Args:
        exact_layers: numbers of layers that are exact as they are, and are left so.
        num_layers, num_kv_heads: of the model.
        option: what a user calls `count`.
    Raises:
        UserError: there are not so many.
    """
    layers = [layer for layer in range(num_layers) if layer not in exact_layers]
    total = len(layers) * num_kv_heads
    if not 0 <= count <= total:
        raise UserError(
            f"{option} is {count}; accepted: 0 to {total}, the key-value heads of layers that are not exact"
        )
    heads: dict[int, list[int]] = {layer: [] for layer in layers}
    for place in (number * total // count for number in range(count)):
        heads[layers[place // num_kv_heads]].append(place % num_kv_heads)
    return {layer: tuple(each) for layer, each in heads.items()}


def beyond_rounding(errors: Tensor) -> Tensor:
    """`errors` [layers, num_kv_heads], shares of what their layer adds, or 0 where they may be rounding."""
    return errors.where(errors > ROUNDING / errors.shape[1], 0.0)


def choose_heads(strategies: Sequence[PartlyExact], errors: Tensor) -> None:
    """Make as many heads exact as are exact now: those with the largest errors; of equal ones those that are already.

    Args:
        strategies: of all layers of a model that have one.
        errors: [layers, num_kv_heads], of `strategies`, as `errors_by_head` measures them.
    """
    errors = beyond_rounding(errors)
    are_exact = torch.zeros_like(errors, dtype=torch.bool)
    for layer, strategy in enumerate(strategies):
        are_exact[layer, list(strategy.heads)] = True
    # Stable sorts: by error, of equal ones those that are exact already, of these the first.
    order = are_exact.flatten().sort(descending=True, stable=True).indices
    order = order[errors.flatten()[order].sort(descending=True, stable=True).indices]
    chosen = torch.zeros_like(are_exact.flatten())
    chosen[order[: int(are_exact.sum())]] = True
    for strategy, heads in zip(strategies, chosen.view_as(are_exact).tolist(), strict=True):
        strategy.heads = tuple(head for head, is_chosen in enumerate(heads) if is_chosen)
