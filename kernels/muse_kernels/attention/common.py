"""What several kernels share."""

import math

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Kernels run in Triton's interpreter, on a CPU."""

LOG2E = tl.constexpr(math.log2(math.e))
"""Logits inside kernels count in powers of two: exp2 is what the hardware has."""

NEGATIVE = tl.constexpr(-1.0e38)
"""A running maximum starts here, not at -inf: -inf - -inf is NaN."""


@triton.jit
def operand(x):
    """A tile as it goes into arithmetic. The interpreter's own bf16 arithmetic is wrong (triton issue 11584)."""
    if INTERPRETED:
        return x.to(tl.float32)
    return x


@triton.jit
def query_cluster(
    query_order,
    a,
    local_head,
    first_row,
    first_head,
    num_rows,
    G: tl.constexpr,
    Q: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
):
    """The a-th query cluster of a group's head: row of the chunk table, head over the batch, number, tokens.

    Tokens int64 [Q], -1 at empty places.
    """
    row = first_row + a // QUERY_CLUSTERS
    head = (first_head * G + local_head).to(tl.int64)
    number = (head * num_rows + first_row) * QUERY_CLUSTERS + a
    token = tl.load(query_order + number * Q + tl.arange(0, Q)).to(tl.int64)
    return row, head, number, token


@triton.jit
def token_rows(
    x,
    token,
    head,
    num_heads,
    stride_batch,
    stride_head,
    stride_token,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of x [B, H, N, D] by token, [tokens, BLOCK_D]; zeros where the index is -1."""
    d = tl.arange(0, BLOCK_D)
    x += (head // num_heads) * stride_batch + (head % num_heads) * stride_head
    mask = (token >= 0)[:, None] & (d < D)[None, :]
    return tl.load(x + token[:, None] * stride_token + d[None, :], mask=mask, other=0.0)


@triton.jit
def listed_cluster(entry, length, K: tl.constexpr, KEY_CLUSTERS: tl.constexpr, CAUSAL: tl.constexpr):
    """Number of the key cluster at an entry of a list, and how many keys it has.

    An empty place (-1) is cluster 0 with no key in it. In a causal far chunk every cluster is full.
    """
    cluster = tl.load(entry)
    num_keys = tl.where(cluster >= 0, K, 0)
    cluster = tl.maximum(cluster, 0)
    if not CAUSAL:
        num_keys = tl.minimum(num_keys, tl.load(length + cluster // KEY_CLUSTERS) - (cluster % KEY_CLUSTERS) * K)
    return cluster, num_keys


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: the power of two that holds `head_dim`, at least 16 (the least a matrix unit takes)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied if the elements of one token are not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()
