"""Inputs and an exact twin for the tests of the MuSe operator."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def random_qkv(
    num_tokens: int, *, batch: int = 1, heads: int = 2, kv_heads: int = 1, head_dim: int = 4, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D], k, v [B, H_kv, N, D] with gradient; float64 unless told otherwise."""
    kwargs = {"dtype": torch.float64, **kwargs}
    shapes = [(batch, n, num_tokens, head_dim) for n in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, **kwargs).requires_grad_() for shape in shapes)


def exact(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, cu_seqlens: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention, one document after the other."""
    ends = [0, q.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    parts = [
        F.scaled_dot_product_attention(
            *(x[:, :, start:end] for x in (q, k, v)), is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        for start, end in itertools.pairwise(ends)
        if end > start
    ]
    return torch.cat(parts, dim=2)
