"""The near field: exact attention within segments, by the fastest library kernel there is for the inputs.

A segment is one chunk of a long document, or a whole document that is exact. The backward pass takes the merged output
and log-sum-exp of near and far field together: a library's backward makes P = exp(logit - L) and
dlogit = P (do . v - do . o) of whatever it is given, which is why forward and backward are called one by one.

| inputs | kernel |
| --- | --- |
| CUDA, 16 bit, no documents | cuDNN, chunks folded into the batch; FlashAttention where cuDNN cannot |
| CUDA, 16 bit, documents | FlashAttention, segments as sequences of variable length |
| CUDA, float32 | PyTorch's memory-efficient attention, with k and v expanded to the heads of q |
| CPU | plain PyTorch, segment by segment |

cuDNN's backward is not deterministic: `torch.use_deterministic_algorithms(True)` takes FlashAttention, whose is then.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, document_bounds
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import Merged, exact_attention, exact_attention_backward

_aten = torch.ops.aten
CUDNN_MAX_HEAD_DIM = 128
"""Its backward pass takes no more."""


def near_field(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, table: ChunkTable, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    """out [B, H, N, D], contiguous, dtype of q; lse float32 [B, H, N], contiguous, natural log.

    Args:
        q: [B, H, N, D]. k, v: [B, H_kv, N, D]. cu_seqlens: int32 [S + 1] or None. table: their chunk table.
    """
    if q.device.type == "cpu":
        return _on_cpu(q, k, v, cu_seqlens, options)
    if cu_seqlens is not None:
        bounds = segment_bounds(cu_seqlens, table, q.shape[2], options)
        return _varlen(q, k, v, bounds, options)
    attend = _dense_kernel(q)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    folds = list(_folds(q.shape, options))
    if len(folds) == 1 and q.shape[0] == 1:
        # One fold of one row: where q is contiguous the library's output, laid out like q, needs no copy.
        part_out, part_lse = attend(*(folds[0].fold(x) for x in (q, k, v)), options)
        return folds[0].unfold(part_out, q.shape).contiguous(), folds[0].unfold(part_lse, q.shape[:3]).contiguous()
    for fold in folds:
        part_out, part_lse = attend(*(fold.fold(x) for x in (q, k, v)), options)
        fold.fold(out).copy_(part_out)
        fold.fold(lse).copy_(part_lse)
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv through the keys of the own segment; contiguous, dtype of q.

    Args:
        out, lse: merged with whatever else the queries attend to.
    """
    if q.device.type == "cpu":
        return _on_cpu_backward(dout, q, k, v, out, lse, cu_seqlens, options)
    if cu_seqlens is not None:
        bounds = segment_bounds(cu_seqlens, table, q.shape[2], options)
        return _varlen_backward(dout, q, k, v, out, lse, bounds, options)
    attend_backward = _dense_kernel_backward(q)
    folds = list(_folds(q.shape, options))
    inputs = (dout, q, k, v, out, lse)
    if len(folds) == 1 and q.shape[0] == 1:
        parts = attend_backward(*(folds[0].fold(x) for x in inputs), options)
        return tuple(  # type: ignore[return-value]
            folds[0].unfold(part, x.shape).contiguous() for part, x in zip(parts, (q, k, v), strict=True)
        )
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for fold in folds:
        for gradient, part in zip(gradients, attend_backward(*(fold.fold(x) for x in inputs), options), strict=True):
            fold.fold(gradient).copy_(part)
    return gradients  # type: ignore[return-value]


# ------------------------------------------------------------------------------------- without documents: folding


class _Fold:
    """Some whole chunks of one batch row, as a batch of their own: a view wherever strides allow it."""

    def __init__(self, batch: slice, tokens: slice, size: int) -> None:
        self.batch, self.tokens, self.size = batch, tokens, size

    def fold(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] -> [chunks, H, size, ...]"""
        return x[self.batch, :, self.tokens].unflatten(2, (-1, self.size)).transpose(1, 2).flatten(0, 1)

    def unfold(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `fold` where it covers everything."""
        return x.transpose(0, 1).reshape(shape)


def _folds(shape: torch.Size, options: ResolvedOptions) -> Iterator[_Fold]:
    batch, _, num_tokens, _ = shape
    size = num_tokens if num_tokens <= options.exact_below else options.chunk
    whole = num_tokens // size * size
    # Rows are folded one by one: only then are chunks of any layout a view.
    for row in range(batch):
        if whole > 0:
            yield _Fold(slice(row, row + 1), slice(0, whole), size)
        if whole < num_tokens:
            yield _Fold(slice(row, row + 1), slice(whole, num_tokens), num_tokens - whole)


def _dense_kernel(q: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    if q.dtype == torch.float32 or q.shape[-1] % 8:
        return _efficient
    return _cudnn if _may_use_cudnn(q) else _flash


def _dense_kernel_backward(q: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if q.dtype == torch.float32 or q.shape[-1] % 8:
        return _efficient_backward
    return _cudnn_backward if _may_use_cudnn(q) else _flash_backward


def _may_use_cudnn(q: Tensor) -> bool:
    return (
        torch.backends.cudnn.is_available()
        and q.shape[-1] <= CUDNN_MAX_HEAD_DIM
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and not torch.are_deterministic_algorithms_enabled()
    )


def _cudnn(q: Tensor, k: Tensor, v: Tensor, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, options.causal, False, scale=options.softmax_scale
    )
    return out, lse.view(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: ResolvedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)
    return _aten._scaled_dot_product_cudnn_attention_backward(
        _laid_out_like(dout, q),
        q,
        k,
        v,
        _laid_out_like(out, q),
        lse.unsqueeze(-1).contiguous(),
        seed[0],
        seed[1],
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        options.causal,
        scale=options.softmax_scale,
    )


def _laid_out_like(x: Tensor, q: Tensor) -> Tensor:
    """x with elements of a token adjacent, which is all that the libraries ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash(q: Tensor, k: Tensor, v: Tensor, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, options.causal, False, scale=options.softmax_scale
    )
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: ResolvedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        options.causal,
        *_random_state(q),
        scale=options.softmax_scale,
    )


def _random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Without dropout nobody reads it."""
    return torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, dtype=torch.uint64, device=q.device)


def _efficient(q: Tensor, k: Tensor, v: Tensor, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    k, v = (_expanded(x, q) for x in (k, v))
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, options.causal, scale=options.softmax_scale
    )
    return out, lse[:, :, : q.shape[2]]


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: ResolvedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)
    padded = -(-q.shape[2] // 32) * 32  # the kernel reads whole tiles of the lse
    lse = torch.nn.functional.pad(lse, (0, padded - q.shape[2]), value=float("inf"))
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        dout,
        q,
        _expanded(k, q),
        _expanded(v, q),
        None,
        out,
        lse,
        seed[0],
        seed[1],
        0.0,
        [True, True, True, False],
        options.causal,
        scale=options.softmax_scale,
    )
    return dq, _summed(dk, k), _summed(dv, v)


def _expanded(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.unflatten(1, (x.shape[1], -1)).sum(2)


# ------------------------------------------------------------------------------------------------- with documents


def segment_bounds(cu_seqlens: Tensor, table: ChunkTable, num_tokens: int, options: ResolvedOptions) -> Tensor:
    """Where segments start and end, int32 [S + C + 1], padded by repeating the number of tokens."""
    bounds = document_bounds(num_tokens, cu_seqlens)
    is_exact = bounds.diff() <= options.exact_below
    starts = torch.cat((torch.where(is_exact, bounds[:-1], num_tokens), table.start))
    return torch.nn.functional.pad(starts.sort().values, (0, 1), value=num_tokens)


def _longest_segment(q: Tensor, options: ResolvedOptions) -> int:
    return min(q.shape[2], max(options.chunk, options.exact_below))


def _tokens_first(x: Tensor) -> Tensor:
    """[1, H, N, D] -> [N, H, D]"""
    return x[0].transpose(0, 1)


def _heads_first(x: Tensor) -> Tensor:
    """[N, H, D] -> [1, H, N, D], contiguous."""
    return x.transpose(0, 1).unsqueeze(0).contiguous()


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    longest = _longest_segment(q, options)
    if q.dtype == torch.float32 or q.shape[-1] % 8:
        k, v = (_expanded(x, q) for x in (k, v))
        out, lse, *_ = _aten._efficient_attention_forward(
            *(_tokens_first(x).unsqueeze(0) for x in (q, k, v)),
            None,
            bounds,
            bounds,
            longest,
            longest,
            0.0,
            int(options.causal),
            True,
            scale=options.softmax_scale,
        )
        return _heads_first(out[0]), _unpadded_lse(lse, bounds, q.shape[2])
    out, lse, *_ = _aten._flash_attention_forward(
        *(_tokens_first(x) for x in (q, k, v)),
        bounds,
        bounds,
        longest,
        longest,
        0.0,
        options.causal,
        False,
        scale=options.softmax_scale,
    )
    return _heads_first(out), lse.unsqueeze(0).contiguous()


def _varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    options: ResolvedOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    longest = _longest_segment(q, options)
    if q.dtype == torch.float32 or q.shape[-1] % 8:
        seed = torch.zeros(2, dtype=torch.int64, device=q.device)
        tensors = (dout, q, _expanded(k, q), _expanded(v, q))
        dout_, q_, k_, v_ = (_tokens_first(x).unsqueeze(0) for x in tensors)
        dq, dk, dv, _ = _aten._efficient_attention_backward(
            dout_,
            q_,
            k_,
            v_,
            None,
            _tokens_first(out).unsqueeze(0),
            bounds,
            bounds,
            longest,
            longest,
            _padded_lse(lse, bounds, longest),
            0.0,
            seed[0],
            seed[1],
            int(options.causal),
            False,
            scale=options.softmax_scale,
        )
        dq, dk, dv = (_heads_first(x[0]) for x in (dq, dk, dv))
        return dq, _summed(dk, k), _summed(dv, v)
    dq, dk, dv = _aten._flash_attention_backward(
        *(_tokens_first(x) for x in (dout, q, k, v, out)),
        lse[0],
        bounds,
        bounds,
        longest,
        longest,
        0.0,
        options.causal,
        *_random_state(q),
        scale=options.softmax_scale,
    )
    return _heads_first(dq), _heads_first(dk), _heads_first(dv)


def _padded_lse(lse: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """[1, H, N] -> [segments, H, longest, rounded up to 32]: how memory-efficient attention stores it."""
    places = torch.arange(-(-longest // 32) * 32, device=lse.device)
    index = (bounds[:-1, None] + places).clamp(max=lse.shape[2] - 1)
    is_token = places < bounds.diff()[:, None]
    padded = torch.where(is_token, lse[0][:, index], float("inf"))  # [H, segments, places]
    return padded.transpose(0, 1).contiguous()


def _unpadded_lse(lse: Tensor, bounds: Tensor, num_tokens: int) -> Tensor:
    """Inverse of `_padded_lse`."""
    token = torch.arange(num_tokens, dtype=torch.int32, device=lse.device)
    segment = torch.searchsorted(bounds[1:], token, right=True)
    return lse[segment, :, (token - bounds[segment]).long()].transpose(0, 1).unsqueeze(0).contiguous()


# --------------------------------------------------------------------------------------------------------- on a CPU


def _segments(q: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions) -> Iterator[slice]:
    num_tokens = q.shape[2]
    bounds = [0, num_tokens] if cu_seqlens is None else document_bounds(num_tokens, cu_seqlens).tolist()
    for start, end in itertools.pairwise(bounds):
        size = max(1, end - start) if end - start <= options.exact_below else options.chunk
        for first in range(start, end, size):
            yield slice(first, min(first + size, end))


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)
    for own in _segments(q, cu_seqlens, options):
        own_q, own_k, own_v = (x[:, :, own].float() for x in (q, k, v))
        out[:, :, own], lse[:, :, own] = exact_attention(
            own_q * options.softmax_scale, own_k, own_v, options.causal, options.workspace_mib
        )
    return out, lse


def _on_cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    options: ResolvedOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for own in _segments(q, cu_seqlens, options):
        own_q, own_k, own_v = (x[:, :, own].float() for x in (q, k, v))
        merged = Merged(*(x[:, :, own].float() for x in (out, lse, dout)))
        own_dq, dk[:, :, own], dv[:, :, own] = exact_attention_backward(
            own_q * options.softmax_scale, own_k, own_v, merged, options.causal, options.workspace_mib
        )
        dq[:, :, own] = own_dq * options.softmax_scale
    return dq, dk, dv
