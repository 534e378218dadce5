"""Exact attention of some heads beside another strategy for the others."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from muse_lightning.attention.base import AttentionStrategy, check_is_whole
from muse_lightning.attention.exact import exact_attention
from muse_lightning.errors import UserError


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
        if len(self.heads) in (0, self.num_kv_heads):
            strategy = self.exact if self.heads else self.others
            out: Tensor = strategy(q, k, v, softmax_scale=softmax_scale, cu_seqlens=cu_seqlens)
            return out
        rest = [head for head in range(self.num_kv_heads) if head not in self.heads]
        # unbind and cat: their backward passes copy every gradient once.
        groups = [x.unflatten(1, (self.num_kv_heads, -1)).unbind(1) for x in (q, k, v)]
        outs: dict[int, Tensor] = {}
        for heads, strategy in ((self.heads, self.exact), (rest, self.others)):
            some = (torch.cat([group[head] for head in heads], dim=1) for group in groups)
            out = strategy(*some, softmax_scale=softmax_scale, cu_seqlens=cu_seqlens)
            outs |= zip(heads, out.unflatten(1, (len(heads), -1)).unbind(1), strict=True)
        return torch.cat([outs[head] for head in range(self.num_kv_heads)], dim=1)

    def check(self, *, seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        check_is_whole(self.others)
        self.others.check(seq_len=seq_len, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)

    def pairs(self, lengths: Sequence[int], *, has_documents: bool = False) -> float:
        share = len(self.heads) / self.num_kv_heads
        exact, others = (s.pairs(lengths, has_documents=has_documents) for s in (self.exact, self.others))
        return share * exact + (1 - share) * others


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
        exact_layers: numbers of layers that are exact as they are, and are left so.
        num_layers, num_kv_heads: of the model.
        window: as in `exact_attention`.
    Raises:
        UserError: there are not so many.
    """
    layers = [layer for layer in range(num_layers) if layer not in exact_layers]
    total = len(layers) * num_kv_heads
    if not 0 <= count <= total:
        raise UserError(
            f"model.exact_heads is {count}; accepted: 0 to {total}, the key-value heads of layers that are not exact"
        )
    heads: dict[int, list[int]] = {layer: [] for layer in layers}
    for place in (number * total // count for number in range(count)):
        heads[layers[place // num_kv_heads]].append(place % num_kv_heads)
    exact = exact_attention(window)

    def make(layer: int) -> AttentionStrategy:
        strategy = attention(layer)
        if not count or layer in exact_layers:
            return strategy
        return PartlyExact(strategy, exact(layer), num_kv_heads, heads[layer])

    return make
