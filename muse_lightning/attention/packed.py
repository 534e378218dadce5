"""Exact causal attention over packed documents, by the best kernel of the device: what strategies share."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# PyTorch 2.11's function has no enable_gqa.
_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def flatten_batch(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [1, H, B * N, D], rows one after the other."""
    return x if x.shape[0] == 1 else x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def unflatten_batch(x: Tensor, batch_size: int) -> Tensor:
    """Inverse of `flatten_batch`."""
    return x if batch_size == 1 else x.squeeze(0).unflatten(1, (batch_size, -1)).transpose(0, 1)


def row_starts(x: Tensor) -> Tensor:
    """cu_seqlens of x [B, H, N, D] when every row is one document: int32 [B + 1]."""
    batch_size, _, num_tokens, _ = x.shape
    return torch.arange(0, batch_size * num_tokens + 1, num_tokens, dtype=torch.int32, device=x.device)


def has_varlen_kernel(x: Tensor) -> bool:
    """Whether PyTorch's variable-length kernel takes this tensor: half precision on CUDA, head_dim a multiple of 8."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.shape[-1] % 8 == 0


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    softmax_scale: float,
    window: int | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Causal attention within documents by PyTorch's variable-length kernel; no mask tensor, no host synchronisation.

    Args:
        q: [B, H, N, D], k, v: [B, H_kv, N, D], for which `has_varlen_kernel` holds.
        cu_seqlens: int32 [S + 1] over the flattened tokens.
        window: keys that a query sees, itself included; None is all earlier ones.
        cu_seqlens_k: that of keys and values, [B, H_kv, L, D], where they are more than the queries, which are then the
            last tokens of each document.
    Returns:
        [B, H, N, D]
    """
    batch_size, num_heads, num_tokens, _ = q.shape
    options: dict[str, Any] = {}
    if k.shape[1] != num_heads:
        if _VARLEN_HAS_GQA:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * N, H, D]
    # The longest document is at most one row, whatever cu_seqlens holds on the device.
    out = varlen_attn(
        flat_q,
        flat_k,
        flat_v,
        cu_seqlens,
        cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
        num_tokens,
        k.shape[2],
        scale=softmax_scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return cast(Tensor, out).unflatten(0, (batch_size, num_tokens)).transpose(1, 2)


def attend_documents(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Apply `attend` to one document after the other, for devices without a variable-length kernel.

    Args:
        attend: maps q [1, H, n, D], k and v [1, H_kv, n, D] of one document to [1, H, n, D].
        q, k, v, cu_seqlens: as in AttentionStrategy.forward.
    """
    flat_q, flat_k, flat_v = (flatten_batch(x) for x in (q, k, v))
    parts = [attend(flat_q[:, :, s], flat_k[:, :, s], flat_v[:, :, s]) for s in document_slices(cu_seqlens)]
    return unflatten_batch(torch.cat(parts, dim=2), q.shape[0])


def document_slices(cu_seqlens: Tensor) -> Iterator[slice]:
    """The documents that are not empty. Reads `cu_seqlens` on the host."""
    ends = cu_seqlens.tolist()
    for start, end in itertools.pairwise(ends):
        if end > start:
            yield slice(start, end)
