"""The near field: exact attention within segments, by the fastest library kernel there is for the inputs.

A segment is one chunk of a long document, or a whole document that is exact. The backward pass takes the merged output
and log-sum-exp of near and far field together: a library's backward makes P = exp(logit - L) and
dlogit = P (do . v - do . o) of whatever it is given, which is why forward and backward are called one by one.

| inputs | kernel |
| --- | --- |
| CUDA, 16 bit, no documents | cuDNN, chunks folded into the batch; FlashAttention for a partial chunk |
| CUDA, 16 bit, documents, head_dim over 128, or determinism asked for | FlashAttention |
| CUDA, float32, or a GPU older than Ampere | PyTorch's memory-efficient attention, k and v expanded to the heads of q |
| CPU | plain PyTorch, segment by segment |

With documents, segments are sequences of variable length in one call. FlashAttention and memory-efficient attention
obey `torch.use_deterministic_algorithms(True)` in their backward, cuDNN does not.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, document_bounds
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import Merged, exact_attention, exact_attention_backward

Backend = Literal["cudnn", "flash", "efficient", "plain"]

CUDNN_HEAD_DIM = 128
"""The largest that cuDNN's backward takes on every GPU."""
CUDNN_TOKENS = 64
"""Shorter segments are FlashAttention's: cuDNN builds a plan for each shape, and refuses single tokens."""
CUDNN_DROPOUT = -0.0
"""No dropout. PyTorch finds cuDNN's compiled plans by the layouts of q, k and v and by the bytes of this number, but a
plan also holds the layouts of out and dout. The minus sign keeps plans made here, for a contiguous out and dout, apart
from those of F.scaled_dot_product_attention for equal q, k and v."""
LSE_TILE = 32
"""Memory-efficient attention rounds rows of the lse up to a multiple of this."""
ALIGNMENT = 16
"""Bytes that kernels load at once; tokens have to start at a multiple."""

_aten = torch.ops.aten


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
    q, k, v = (_padded(x) for x in (q, k, v))
    if cu_seqlens is not None:
        segments = _segments(q, cu_seqlens, table, options)
        out, lse = _attend(backend, (q, k, v), segments, options)
    elif len(folds := _folds(q, options)) == 1:
        # The kernel lays its output out like q: no copy where that is contiguous, which cuDNN's always is.
        q = q.contiguous() if backend == "cudnn" else q
        out, lse = (folds[0].unfold(x) for x in _attend(backend, (folds[0].fold(x) for x in (q, k, v)), None, options))
    else:
        out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:-1], dtype=torch.float32)
        q = q.contiguous() if backend == "cudnn" else q
        for fold in folds:
            part = _attend(backend, (fold.fold(x) for x in (q, k, v)), None, options)
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
    q, k, v, out, dout = (_padded(x) for x in (q, k, v, out, dout))
    lse = lse.contiguous()
    gradients: tuple[Tensor, ...]
    if cu_seqlens is not None:
        segments = _segments(q, cu_seqlens, table, options)
        gradients = _attend_backward(backend, (dout, q, k, v, out, lse), segments, options)
    else:
        if backend == "cudnn":
            q, out, dout = q.contiguous(), out.contiguous(), dout.contiguous()
        inputs = (dout, q, k, v, out, lse)
        folds = _folds(q, options)
        if len(folds) == 1:
            parts = _attend_backward(backend, (folds[0].fold(x) for x in inputs), None, options)
            gradients = tuple(folds[0].unfold(x) for x in parts)
        else:
            gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
            for fold in folds:
                parts = _attend_backward(backend, (fold.fold(x) for x in inputs), None, options)
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


class _Segments(NamedTuple):
    bounds: Tensor
    """Where segments start, int32 [segments + 1]; some are empty."""
    longest: int
    """No segment has more tokens."""


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


def _segments(q: Tensor, cu_seqlens: Tensor, table: ChunkTable, options: ResolvedOptions) -> _Segments:
    """A segment starts where a document or a chunk does; both make an empty one, as unused rows of the table do."""
    num_tokens = q.shape[2]
    bounds = torch.cat((document_bounds(num_tokens, cu_seqlens), table.start)).sort().values
    return _Segments(bounds, min(num_tokens, max(options.chunk, options.exact_below)))


# ------------------------------------------------------------------------------------------------------------- kernels


def _attend(
    backend: Backend, inputs: Iterable[Tensor], segments: _Segments | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    """out [B, H, N, D] and lse [B, H, N] of rows that are one segment each, or of one row of several segments.

    Args:
        inputs: q, k, v.
    """
    q, k, v = (_readable(x) for x in inputs)
    if backend == "efficient":
        return _efficient(q, k, v, segments, options)
    if backend == "cudnn" and segments is None and q.shape[2] >= CUDNN_TOKENS:
        return _cudnn(q, k, v, options)
    return _flash(q, k, v, segments, options)


def _attend_backward(
    backend: Backend, inputs: Iterable[Tensor], segments: _Segments | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv.

    Args:
        inputs: dout, q, k, v, out, lse.
    """
    dout, q, k, v, out, lse = inputs
    dout, q, k, v, out = (_readable(x) for x in (dout, q, k, v, out))
    if backend == "efficient":
        return _efficient_backward(dout, q, k, v, out, lse, segments, options)
    if backend == "cudnn" and segments is None and q.shape[2] >= CUDNN_TOKENS:
        return _cudnn_backward(dout, q, k, v, out, lse, options)
    return _flash_backward(dout, q, k, v, out, lse, segments, options)


def _padded(x: Tensor) -> Tensor:
    """Zeros up to a multiple of 8 elements of a token, which changes nothing but suits the kernels."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _readable(x: Tensor) -> Tensor:
    """x, copied if its tokens are not adjacent elements that start at aligned addresses."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    is_aligned = all(stride > 0 and stride * x.element_size() % ALIGNMENT == 0 for stride in strides)
    is_readable = is_aligned and x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0
    return x if is_readable else x.clone(memory_format=torch.contiguous_format)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, CUDNN_DROPOUT, options.causal, False, scale=options.softmax_scale
    )
    return out, lse.view(q.shape[:-1])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: ResolvedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = q.shape[2]
    no_seed = torch.empty((), dtype=torch.int64, device=q.device)  # nobody reads it without dropout
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.reshape(_cudnn_lse_shape(q)).contiguous(),
        no_seed,
        no_seed,
        None,
        None,
        None,
        num_tokens,
        num_tokens,
        CUDNN_DROPOUT,
        options.causal,
        scale=options.softmax_scale,
    )
    return dq, dk, dv


def _cudnn_lse_shape(q: Tensor) -> tuple[int, ...]:
    """[B, H, N] or [B, H, N, 1], by PyTorch's release."""
    return (*q.shape[:3], 1)[: _cudnn_lse_dims(q.device)]


@functools.cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """Dimensions of the lse that PyTorch gives and takes: tried once, since it does other than it declares."""
    x = torch.zeros(1, 1, CUDNN_TOKENS, CUDNN_TOKENS, dtype=torch.float16, device=device)
    return _aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, CUDNN_DROPOUT)[1].dim()


def _flash_arguments(segments: _Segments | None, num_tokens: int) -> tuple[Tensor | None, Tensor | None, int, int]:
    if segments is None:
        return None, None, num_tokens, num_tokens
    # A longest of 1 makes the kernel take query heads for tokens, with another layout of the lse.
    longest = max(segments.longest, 2)
    return segments.bounds, segments.bounds, longest, longest


def _tokens_first(x: Tensor, segments: _Segments | None) -> Tensor:
    """[B, H, N, D] -> [B, N, H, D], or with segments [N, H, D]."""
    return x.transpose(1, 2) if segments is None else x[0].transpose(0, 1)


def _heads_first(x: Tensor) -> Tensor:
    """Inverse of `_tokens_first`."""
    return x.transpose(1, 2) if x.dim() == 4 else x.transpose(0, 1).unsqueeze(0)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, segments: _Segments | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._flash_attention_forward(
        *(_tokens_first(x, segments) for x in (q, k, v)),
        *_flash_arguments(segments, q.shape[2]),
        0.0,
        options.causal,
        False,
        scale=options.softmax_scale,
    )
    return _heads_first(out), lse.view(q.shape[:-1])


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: _Segments | None,
    options: ResolvedOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    no_seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    gradients = _aten._flash_attention_backward(
        *(_tokens_first(x, segments) for x in (dout, q, k, v, out)),
        (lse if segments is None else lse[0]).contiguous(),
        *_flash_arguments(segments, q.shape[2]),
        0.0,
        options.causal,
        no_seed,
        no_seed,
        scale=options.softmax_scale,
    )
    dq, dk, dv = (_heads_first(x) for x in gradients)
    return dq, dk, dv


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, segments: _Segments | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    bounds, longest = (None, q.shape[2]) if segments is None else segments
    out, lse, *_ = _aten._efficient_attention_forward(
        *(x.transpose(1, 2) for x in (q, _expanded(k, q), _expanded(v, q))),
        None,
        bounds,
        bounds,
        longest,
        longest,
        0.0,
        int(options.causal),  # 1 is a causal mask from the top left corner
        True,
        scale=options.softmax_scale,
    )
    return out.transpose(1, 2), lse[:, :, : q.shape[2]] if bounds is None else _by_token(lse, bounds, q.shape[2])


def _efficient_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: _Segments | None,
    options: ResolvedOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds, longest = (None, q.shape[2]) if segments is None else segments
    no_seed = torch.zeros((), dtype=torch.int64, device=q.device)
    padded_lse = (
        F.pad(lse, (0, -longest % LSE_TILE), value=float("inf"))
        if bounds is None
        else _by_segment(lse, bounds, longest)
    )
    dq, dk, dv, _ = _aten._efficient_attention_backward(
        dout.transpose(1, 2),
        *(x.transpose(1, 2) for x in (q, _expanded(k, q), _expanded(v, q))),
        None,
        out.transpose(1, 2).contiguous(),  # the kernel looks at no stride of its tokens
        bounds,
        bounds,
        longest,
        longest,
        padded_lse,
        0.0,
        no_seed,
        no_seed,
        int(options.causal),
        False,
        scale=options.softmax_scale,
    )
    dk, dv = (x.unflatten(2, (k.shape[1], -1)).sum(3) for x in (dk, dv))
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return dq, dk, dv


def _expanded(x: Tensor, q: Tensor) -> Tensor:
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _by_segment(lse: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """[1, H, N] -> [segments, H, longest rounded up], where +inf stands for no token."""
    place = torch.arange(longest + -longest % LSE_TILE, dtype=torch.int32, device=lse.device)
    token = (bounds[:-1, None] + place).clamp(max=lse.shape[2] - 1)
    is_token = place < bounds.diff()[:, None]
    return torch.where(is_token, lse[0][:, token], float("inf")).transpose(0, 1).contiguous()


def _by_token(lse: Tensor, bounds: Tensor, num_tokens: int) -> Tensor:
    """Inverse of `_by_segment`."""
    token = torch.arange(num_tokens, dtype=torch.int32, device=lse.device)
    segment = torch.searchsorted(bounds[1:], token, right=True).clamp(max=bounds.shape[0] - 2)
    place = (token - bounds[segment]).clamp(0, lse.shape[2] - 1)
    return lse[segment, :, place].transpose(0, 1).unsqueeze(0)


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
