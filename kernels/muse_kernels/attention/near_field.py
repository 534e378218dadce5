"""The near field: exact attention within segments, by the fastest library kernel there is for the inputs.

A segment is one chunk of a long document, or a whole document that is exact. The backward pass takes the merged output
and log-sum-exp of near and far field together: a library's backward makes P = exp(logit - L) and
dlogit = P (do . v - do . o) of whatever it is given, which is why forward and backward are called one by one
(near_library.py).

| inputs | kernel |
| --- | --- |
| CUDA, 16 bit, no documents | cuDNN, chunks folded into the batch; FlashAttention for a partial chunk |
| CUDA, 16 bit, documents, head_dim over 128, or determinism asked for | FlashAttention |
| CUDA, float32, or a GPU older than Ampere | PyTorch's memory-efficient attention, k and v expanded to the heads of q |
| CPU | plain PyTorch, segment by segment |

With documents, segments are sequences of variable length in one call. FlashAttention and memory-efficient attention
obey `torch.use_deterministic_algorithms(True)` in their backward, cuDNN does not.
"""

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, document_bounds
from muse_kernels.attention.near_library import CUDNN_TOKENS, Library, Segments, attend, attend_backward, padded
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import Merged, exact_attention, exact_attention_backward

Backend = Library | Literal["plain"]

CUDNN_HEAD_DIM = 128
"""The largest that cuDNN's backward takes on every GPU."""


def choose_backend(q: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions) -> Backend:
    """The fastest kernel that takes these inputs."""
    if q.device.type == "cpu":
        return "plain"
    if q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < (8, 0):
        return "efficient"
    may_use_cudnn = (
        cu_seqlens is None
        and q.shape[-1] <= CUDNN_HEAD_DIM
        and _segment_tokens(q.shape[2], options) >= CUDNN_TOKENS
        and torch.backends.cudnn.is_available()
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
    )
    return "cudnn" if may_use_cudnn else "flash"


def near_field(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    table: ChunkTable,
    options: ResolvedOptions,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every token to its own segment, on CUDA without reading anything on the host.

    Args:
        q: [B, H, N, D]; k, v: [B, H_kv, N, D]; any strides.
        cu_seqlens: int32 [S + 1] or None. table: their chunk table.
        backend: None is `choose_backend`'s.
    Returns:
        out [B, H, N, D], contiguous, dtype of q; lse float32 [B, H, N], contiguous, natural log.
    """
    backend = backend or choose_backend(q, cu_seqlens, options)
    if q.numel() == 0:
        return q.new_zeros(q.shape), q.new_zeros(q.shape[:-1], dtype=torch.float32)
    if backend == "plain":
        return _plain(q, k, v, cu_seqlens, options)
    head_dim = q.shape[-1]
    q, k, v = (padded(x) for x in (q, k, v))
    if cu_seqlens is not None:
        segments = _segments(q, cu_seqlens, table, options)
        out, lse = attend(backend, (q, k, v), segments, options)
    elif len(folds := _folds(q, options)) == 1:
        # The kernel lays its output out like q: no copy where that is contiguous, which cuDNN's always is.
        q = q.contiguous() if backend == "cudnn" else q
        out, lse = (folds[0].unfold(x) for x in attend(backend, (folds[0].fold(x) for x in (q, k, v)), None, options))
    else:
        out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:-1], dtype=torch.float32)
        q = q.contiguous() if backend == "cudnn" else q
        for fold in folds:
            part = attend(backend, (fold.fold(x) for x in (q, k, v)), None, options)
            for whole, x in zip((out, lse), part, strict=True):
                fold.fold(whole).copy_(x)
    return out[..., :head_dim].contiguous(), lse.contiguous()


def near_field_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    table: ChunkTable,
    options: ResolvedOptions,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the keys of the own segment, on CUDA without reading anything on the host.

    Args:
        dout, out: [B, H, N, D]. lse: float32 [B, H, N], natural log. Merged with whatever else the queries attend to.
        q, k, v, cu_seqlens, table, backend: as in `near_field`.
    Returns:
        dq, dk, dv, contiguous, dtype of q.
    """
    backend = backend or choose_backend(q, cu_seqlens, options)
    if q.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    if backend == "plain":
        return _plain_backward(dout, q, k, v, out, lse, cu_seqlens, options)
    head_dim = q.shape[-1]
    q, k, v, out, dout = (padded(x) for x in (q, k, v, out, dout))
    lse = lse.contiguous()
    gradients: tuple[Tensor, ...]
    if cu_seqlens is not None:
        segments = _segments(q, cu_seqlens, table, options)
        gradients = attend_backward(backend, (dout, q, k, v, out, lse), segments, options)
    else:
        if backend == "cudnn":
            q, out, dout = q.contiguous(), out.contiguous(), dout.contiguous()
        inputs = (dout, q, k, v, out, lse)
        folds = _folds(q, options)
        if len(folds) == 1:
            parts = attend_backward(backend, (folds[0].fold(x) for x in inputs), None, options)
            gradients = tuple(folds[0].unfold(x) for x in parts)
        else:
            gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
            for fold in folds:
                parts = attend_backward(backend, (fold.fold(x) for x in inputs), None, options)
                for whole, x in zip(gradients, parts, strict=True):
                    fold.fold(whole).copy_(x)
    dq, dk, dv = (x[..., :head_dim].contiguous() for x in gradients)
    return dq, dk, dv


# ---------------------------------------------------------------------------------------------------- what is attended


class _Fold(NamedTuple):
    """Whole chunks of some batch rows, as a batch of their own: always a view."""

    rows: slice
    tokens: slice
    chunks: int
    """Chunks in each row."""

    def fold(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] -> [rows * chunks, H, tokens per chunk, ...]"""
        return x[self.rows, :, self.tokens].unflatten(2, (self.chunks, -1)).transpose(1, 2).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """Inverse of `fold` where it covers everything."""
        return x.unflatten(0, (-1, self.chunks)).transpose(1, 2).flatten(2, 3)


def _segment_tokens(num_tokens: int, options: ResolvedOptions) -> int:
    """Tokens in each segment but the last, without documents."""
    return num_tokens if num_tokens <= options.exact_below else min(num_tokens, options.chunk)


def _folds(q: Tensor, options: ResolvedOptions) -> list[_Fold]:
    batch_size, _, num_tokens, _ = q.shape
    size = _segment_tokens(num_tokens, options)
    chunks = num_tokens // size
    whole = chunks * size
    # Chunks of several rows make one batch in few layouts only; single chunks, and chunks of one row, in all.
    rows = [slice(0, batch_size)] if chunks == 1 else [slice(row, row + 1) for row in range(batch_size)]
    folds = [_Fold(row, slice(0, whole), chunks) for row in rows]
    if whole < num_tokens:
        folds.append(_Fold(slice(0, batch_size), slice(whole, num_tokens), 1))
    return folds


def _segments(q: Tensor, cu_seqlens: Tensor, table: ChunkTable, options: ResolvedOptions) -> Segments:
    """A segment starts where a document or a chunk does; both make an empty one, as unused rows of the table do."""
    num_tokens = q.shape[2]
    bounds = torch.cat((document_bounds(num_tokens, cu_seqlens), table.start)).sort().values
    return Segments(bounds, min(num_tokens, max(options.chunk, options.exact_below)))


# ------------------------------------------------------------------------------------------------------- plain PyTorch


def _segment_slices(q: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions) -> Iterator[slice]:
    """The segments. Reads `cu_seqlens` on the host."""
    num_tokens = q.shape[2]
    bounds = [0, num_tokens] if cu_seqlens is None else document_bounds(num_tokens, cu_seqlens).tolist()
    for start, end in itertools.pairwise(bounds):
        size = options.chunk if end - start > options.exact_below else max(1, end - start)
        for first in range(start, end, size):
            yield slice(first, min(first + size, end))


def _plain(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for own in _segment_slices(q, cu_seqlens, options):
        own_q, own_k, own_v = (x[:, :, own].float() for x in (q, k, v))
        out[:, :, own], lse[:, :, own] = exact_attention(
            own_q * options.softmax_scale, own_k, own_v, options.causal, options.workspace_mib
        )
    return out, lse


def _plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    options: ResolvedOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for own in _segment_slices(q, cu_seqlens, options):
        own_q, own_k, own_v = (x[:, :, own].float() for x in (q, k, v))
        merged = Merged(*(x[:, :, own].float() for x in (out, lse, dout)))
        own_dq, dk[:, :, own], dv[:, :, own] = exact_attention_backward(
            own_q * options.softmax_scale, own_k, own_v, merged, options.causal, options.workspace_mib
        )
        dq[:, :, own] = own_dq * options.softmax_scale
    return dq, dk, dv
