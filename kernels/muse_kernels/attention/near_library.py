"""Exact attention by PyTorch's library kernels, forward and backward one by one, in one form for all of them.

    attend           q, k, v -> out, lse
    attend_backward  dout, q, k, v, out, lse -> dq, dk, dv          out and lse may be merged with other keys'

Their operators are private to PyTorch, and each has its own layout of tokens, of the lse and of sequences of variable
length. Which is called when: near_field.py.
"""

import functools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_kernels.attention.options import ResolvedOptions

Library = Literal["cudnn", "flash", "efficient"]

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


class Segments(NamedTuple):
    """Where the sequences of variable length are in one row."""

    bounds: Tensor
    """Where segments start, int32 [segments + 1]; some are empty."""
    longest: int
    """No segment has more tokens."""


def attend(
    library: Library, inputs: Iterable[Tensor], segments: Segments | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor]:
    """out [B, H, N, D] and lse [B, H, N] of rows that are one segment each, or of one row of several segments.

    Args:
        inputs: q, k, v.
    """
    q, k, v = (_readable(x) for x in inputs)
    if library == "efficient":
        return _efficient(q, k, v, segments, options)
    if library == "cudnn" and segments is None and q.shape[2] >= CUDNN_TOKENS:
        return _cudnn(q, k, v, options)
    return _flash(q, k, v, segments, options)


def attend_backward(
    library: Library, inputs: Iterable[Tensor], segments: Segments | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv.

    Args:
        inputs: dout, q, k, v, out, lse.
    """
    dout, q, k, v, out, lse = inputs
    dout, q, k, v, out = (_readable(x) for x in (dout, q, k, v, out))
    if library == "efficient":
        return _efficient_backward(dout, q, k, v, out, lse, segments, options)
    if library == "cudnn" and segments is None and q.shape[2] >= CUDNN_TOKENS:
        return _cudnn_backward(dout, q, k, v, out, lse, options)
    return _flash_backward(dout, q, k, v, out, lse, segments, options)


def padded(x: Tensor) -> Tensor:
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


def _flash_arguments(segments: Segments | None, num_tokens: int) -> tuple[Tensor | None, Tensor | None, int, int]:
    if segments is None:
        return None, None, num_tokens, num_tokens
    # A longest of 1 makes the kernel take query heads for tokens, with another layout of the lse.
    longest = max(segments.longest, 2)
    return segments.bounds, segments.bounds, longest, longest


def _tokens_first(x: Tensor, segments: Segments | None) -> Tensor:
    """[B, H, N, D] -> [B, N, H, D], or with segments [N, H, D]."""
    return x.transpose(1, 2) if segments is None else x[0].transpose(0, 1)


def _heads_first(x: Tensor) -> Tensor:
    """Inverse of `_tokens_first`."""
    return x.transpose(1, 2) if x.dim() == 4 else x.transpose(0, 1).unsqueeze(0)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, options: ResolvedOptions
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
    segments: Segments | None,
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
    q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, options: ResolvedOptions
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
    segments: Segments | None,
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
