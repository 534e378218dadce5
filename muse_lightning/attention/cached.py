"""Exact attention that remembers: keys and values of earlier calls, for generation token by token.

Letters: B batch, H heads, n new tokens, L tokens in the cache, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.dense import Dense
from muse_lightning.attention.packed import has_varlen_kernel, row_starts, varlen_attention
from muse_lightning.attention.sliding_window import SlidingWindow

_LARGEST_LOGITS = 1 << 26
"""Elements of B * H * n * L that exist at once where a mask is needed: 256 MiB of float32."""


class CachedAttention(AttentionStrategy):
    """Exact causal attention in which every call goes on where the one before ended.

    Not for recipes: it holds the keys and values of one batch of texts. `Llama.attention_as` puts it into a model,
    whose `position_ids` must then continue too. The cache doubles when it is full; with a window, what is out of sight
    is dropped then.

    Args:
        layer_idx: number of the layer, from 0.
        window: tokens in sight, itself included; None is all earlier ones.
    """

    def __init__(self, layer_idx: int, window: int | None = None) -> None:
        super().__init__(layer_idx)
        self.window = window
        self.length = 0
        """Tokens in the cache."""
        self._alone = Dense(layer_idx) if window is None else SlidingWindow(layer_idx, window)
        self._keys: Tensor | None = None  # [B, H_kv, capacity, D]
        self._values: Tensor | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Attention of new tokens to those before and to each other.

        Raises:
            ValueError: `cu_seqlens` is given: each row is one text.
        """
        if cu_seqlens is not None:
            raise ValueError("CachedAttention continues one text per row; cu_seqlens must be None")
        is_first = self.length == 0
        keys, values = self._append(k, v)
        if is_first:
            return self._alone(q, k, v, softmax_scale=softmax_scale)
        return attend_to_the_end(q, keys, values, softmax_scale, self.window)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with the new ones behind, [B, H_kv, L, D] each; views of the cache."""
        end = self.length + k.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            kept = self.length if self.window is None else min(self.length, self.window - 1)
            end = kept + k.shape[2]
            self._keys, self._values = (
                _moved(cache, new, kept, self.length, capacity=2 * end)
                for cache, new in ((self._keys, k), (self._values, v))
            )
            self.length = kept
        self._keys[:, :, self.length : end] = k
        self._values[:, :, self.length : end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def _moved(cache: Tensor | None, new: Tensor, kept: int, length: int, capacity: int) -> Tensor:
    """A larger cache that begins with the last `kept` of the `length` tokens of `cache`."""
    batch_size, num_heads, _, head_dim = new.shape
    larger = new.new_empty(batch_size, num_heads, capacity, head_dim)
    if cache is not None:
        larger[:, :, :kept] = cache[:, :, length - kept : length]
    return larger


def attend_to_the_end(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window: int | None = None) -> Tensor:
    """Exact causal attention of the last n of L tokens.

    Query i stands at position L - n + i:

                keys
        queries 1 1 1 0
                1 1 1 1     (n = 2, L = 4)

    Args:
        q: [B, H, n, D]. k, v: [B, H_kv, L, D], L at least n, H a multiple of H_kv.
        softmax_scale: factor of q . k.
        window: keys that a query sees, itself included; None is all earlier ones.
    Returns:
        [B, H, n, D]
    """
    batch_size, num_heads, num_queries, _ = q.shape
    if window is not None:
        in_sight = num_queries + window - 1
        k, v = k[:, :, -in_sight:], v[:, :, -in_sight:]
    num_keys = k.shape[2]
    is_grouped = num_heads != k.shape[1]
    if num_queries == 1:  # It sees all that is left: without a mask faster kernels take it.
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, enable_gqa=is_grouped)
    if has_varlen_kernel(q):
        return varlen_attention(q, k, v, row_starts(q), softmax_scale, window, cu_seqlens_k=row_starts(k))
    piece = max(1, _LARGEST_LOGITS // (batch_size * num_heads * num_keys))
    key_index = torch.arange(num_keys, device=q.device)
    parts = []
    for queries, positions in zip(q.split(piece, dim=2), key_index[-num_queries:].split(piece), strict=True):
        age = positions[:, None] - key_index  # [piece, L]
        sees = age >= 0 if window is None else (age >= 0) & (age < window)
        parts.append(
            F.scaled_dot_product_attention(queries, k, v, attn_mask=sees, scale=softmax_scale, enable_gqa=is_grouped)
        )
    return torch.cat(parts, dim=2)
