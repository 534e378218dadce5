"""Attention to the most recent tokens only: the baseline that shows what far context is worth."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.dense import sdpa
from muse_lightning.attention.packed import attend_documents, has_varlen_kernel, row_starts, varlen_attention
from muse_lightning.errors import UserError


class SlidingWindow(AttentionStrategy):
    """Every token sees exactly the last `window` tokens of its document, itself included.

    Args:
        layer_idx: number of the layer, from 0.
        window: tokens in sight. Cost grows in proportion.
    Raises:
        UserError: a window below 1.
    """

    heads_are_alike = True

    def __init__(self, layer_idx: int, window: int = 2048) -> None:
        super().__init__(layer_idx)
        if window < 1:
            raise UserError(f"SlidingWindow: window must be at least 1 token, got {window}")
        self.window = window

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        if has_varlen_kernel(q):
            documents = row_starts(q) if cu_seqlens is None else cu_seqlens
            return varlen_attention(q, k, v, documents, softmax_scale, self.window)
        attend = partial(banded_attention, window=self.window, softmax_scale=softmax_scale)
        return attend(q, k, v) if cu_seqlens is None else attend_documents(attend, q, k, v, cu_seqlens)

    def pairs(self, lengths: Sequence[int], *, has_documents: bool = False) -> float:
        full = [min(length, self.window) for length in lengths]
        return float(
            sum(w * (w + 1) // 2 + (length - w) * self.window for length, w in zip(lengths, full, strict=True))
        )


def banded_attention(q: Tensor, k: Tensor, v: Tensor, window: int, softmax_scale: float) -> Tensor:
    """Sliding-window attention from blocks of `window` queries, each over its own and the previous block of keys.

    The only mask is [window, 2 * window], shared by all blocks. Shapes as in AttentionStrategy.forward.
    """
    num_tokens = q.shape[2]
    first = sdpa(q[:, :, :window], k[:, :, :window], v[:, :, :window], softmax_scale)
    if num_tokens <= window:
        return first
    padding = -num_tokens % window
    q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
    blocks = q[:, :, window:].unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)  # [B * blocks, H, window, D]
    keys, values = (x.unfold(2, 2 * window, window).transpose(1, 2).flatten(0, 1).mT for x in (k, v))
    age = torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)
    rest = F.scaled_dot_product_attention(
        blocks,
        keys,
        values,
        attn_mask=(age >= 0) & (age < window),
        scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    rest = rest.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :num_tokens]
