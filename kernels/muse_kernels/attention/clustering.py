"""Clusters by recursive bisection, and their means (docs/attention.md, "Clustering").

A node is a run of n members. For queries and keys alike, one launch splits all nodes twice, one program per node:

    C = sum_i x_i x_i^T - n m m^T                m = sum_i x_i / n
    u_0 = C m (C e_j, j the coordinate of largest variance, if that is 0)        u_{t+1} = C u_t
    w_0 = P C P m (P C e_j, of what is left)      P = 1 - u u^T / |u|^2          w_{t+1} = P C w_t
    first half = the n / 2 members with the smallest u . x_i; of equal ones the earlier token goes first
    either half again: by u . x_i or w . x_i, u and w at length 1, whichever varies more in it

A node of two clusters is split once. Members stay in ascending token order in every part, so that a split is a stable
partition and needs no sort: the median is found in an integer that orders as the projection does. A pass over the
members gathers C, a second one the projections; both read x by token index.

Shape letters: B batch, H heads, N tokens, C rows of the chunk table, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable
from muse_kernels.attention.common import operand, padded_head_dim, rows_contiguous
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import POWER_ITERATIONS, bisected

LARGEST_HEAD_DIM = 128
"""Registers hold the covariance of no larger head; those few models are left to plain PyTorch."""

NUM_PRODUCTS = tl.constexpr(POWER_ITERATIONS)
LEAST_KEY = tl.constexpr(-(2**31))
GREATEST_KEY = tl.constexpr(2**31 - 1)
TINY = tl.constexpr(1e-37)


@triton.jit
def _member_rows(x_ptr, tokens, is_member, stride_xn, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of x by token index, [TILE, BLOCK_D]; zeros where there is no member."""
    d = tl.arange(0, BLOCK_D)
    row_ptr = x_ptr + tokens.to(tl.int64) * stride_xn
    mask = is_member[:, None] & (d < HEAD_DIM)[None, :]
    return operand(tl.load(row_ptr[:, None] + d[None, :], mask=mask, other=0.0))


@triton.jit
def _node_tokens(order_ptr, start, places, count, IS_FIRST_LEVEL: tl.constexpr):
    """Token indices at these places of a node, -1 where there is no member. Before the first level none are stored."""
    return tl.where(places < count, start + places, -1) if IS_FIRST_LEVEL else tl.load(order_ptr + places)


@triton.jit
def _largest(direction):
    return tl.maximum(tl.max(tl.abs(direction)), TINY)


@triton.jit
def _product(covariance, direction, away, HAS_AWAY: tl.constexpr):
    """covariance . direction, without its part along the unit vector `away`."""
    direction = tl.sum(covariance * direction[None, :], axis=1)
    if HAS_AWAY:
        direction -= away * tl.sum(direction * away)
    return direction


@triton.jit
def _direction(covariance, start, away, BLOCK_D: tl.constexpr, HAS_AWAY: tl.constexpr):
    """Direction of greatest variance, of length 1 or 0, among those at right angles to `away`.

    Scaled by largest elements: squares could overflow, and work on the whole covariance costs most here.

    Args:
        start: what the first product is with, unless that is 0.
    """
    direction = _product(covariance, start, away, HAS_AWAY)
    if tl.max(tl.abs(direction)) == 0:
        i = tl.arange(0, BLOCK_D)
        variance = tl.sum(tl.where(i[:, None] == i[None, :], covariance, 0.0), axis=0)
        if HAS_AWAY:
            variance -= away * away * tl.sum(away * tl.sum(covariance * away[None, :], axis=1))
        # Not argmax: for sm_100, Triton 3.6 and 3.7 fail on a reduction over a named axis of what a reduction gave.
        widest = i == tl.min(tl.where(variance == tl.max(variance), i, BLOCK_D))
        direction = _product(covariance, tl.where(widest, 1.0, 0.0), away, HAS_AWAY)
    scale = 1 / _largest(direction)
    direction *= scale
    for product in tl.static_range(NUM_PRODUCTS):
        direction = _product(covariance, direction, away, HAS_AWAY) * scale
        if product % 2 == 1:
            direction /= _largest(direction)
    return direction / tl.sqrt(tl.maximum(tl.sum(direction * direction), TINY))


@triton.jit
def _goes_first(projection, is_member, SIZE: tl.constexpr):
    """Whether a member is in the half of its row with the smallest projections, of equal ones the earlier.

    NaN counts as 0. projection [rows, SIZE].
    """
    HALF: tl.constexpr = SIZE // 2
    projection = tl.where((projection == projection) & (projection != 0), projection, 0.0)  # no -0.0 either
    bits = projection.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ GREATEST_KEY, bits)
    key = tl.where(is_member, key, GREATEST_KEY)
    # The largest key that has fewer than HALF keys below it, from the sign down to the last bit, two at a time: three
    # counts below 2^21 in one sum.
    threshold = tl.where(tl.sum((key < 0).to(tl.int32), axis=1) < HALF, 0, LEAST_KEY)
    for step in range(15):
        unit = 1 << (29 - 2 * step)
        limit = threshold[:, None] + unit
        counts = (key < limit).to(tl.int64)
        counts += (key < limit + unit).to(tl.int64) << 21
        counts += (key < limit + 2 * unit).to(tl.int64) << 42
        counts = tl.sum(counts, axis=1)
        passed = ((counts & 0x1FFFFF) < HALF).to(tl.int32) + (((counts >> 21) & 0x1FFFFF) < HALF).to(tl.int32)
        threshold += unit * (passed + ((counts >> 42) < HALF).to(tl.int32))
    threshold += (tl.sum((key < threshold[:, None] + 1).to(tl.int32), axis=1) < HALF).to(tl.int32)
    is_below = key < threshold[:, None]
    is_equal = key == threshold[:, None]
    missing = HALF - tl.sum(is_below.to(tl.int32), axis=1)
    return is_below | (is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=1) <= missing[:, None]))


@triton.jit
def _variance(projection, is_member):
    """Sum of squared distances from the mean, of the members of each row."""
    mean = tl.sum(projection, axis=1) / tl.maximum(tl.sum(is_member.to(tl.float32), axis=1), 1.0)
    centred = tl.where(is_member, projection - mean[:, None], 0.0)
    return tl.sum(centred * centred, axis=1)


@triton.jit
def _places(projection, place, is_member, SIZE: tl.constexpr):
    """Where the members at places [rows, SIZE] go when every row is split."""
    goes_first = _goes_first(projection, is_member, SIZE)
    rank = tl.cumsum(goes_first.to(tl.int32), axis=1)
    i = tl.arange(0, SIZE)[None, :]
    return place - i + tl.where(goes_first, rank - 1, SIZE // 2 + i - rank)


@triton.jit(do_not_specialize=["num_rows", "end_head"])
def muse_cluster_split(
    x_ptr,
    order_ptr,
    cluster,
    stride_xb,
    stride_xh,
    stride_xn,
    num_heads,
    other_x_ptr,
    other_order_ptr,
    other_cluster,
    other_stride_xb,
    other_stride_xh,
    other_stride_xn,
    other_num_heads,
    projection_ptr,
    second_ptr,
    start_ptr,
    length_ptr,
    end_head,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Split every node of SIZE members in place, twice where clusters have at most SIZE / 4, one program each.

    order [B * H, C, CHUNK / SIZE, SIZE]: `end_head` heads of one tensor, then those of another.
    """
    HALF: tl.constexpr = SIZE // 2
    IS_FIRST_LEVEL: tl.constexpr = SIZE == CHUNK
    node = tl.program_id(0).to(tl.int64)
    row = node // (CHUNK // SIZE) % num_rows
    head = node // (CHUNK // SIZE) // num_rows
    projection_ptr += node * SIZE
    second_ptr += node * SIZE
    is_other = head >= end_head
    if is_other:
        x_ptr, order_ptr = other_x_ptr, other_order_ptr
    # Not in the branch: Triton makes a constant of a 1, which no branch can replace.
    cluster = tl.where(is_other, other_cluster, cluster)
    stride_xb = tl.where(is_other, other_stride_xb, stride_xb)
    stride_xh = tl.where(is_other, other_stride_xh, stride_xh)
    stride_xn = tl.where(is_other, other_stride_xn, stride_xn)
    num_heads = tl.where(is_other, other_num_heads, num_heads)
    head -= tl.where(is_other, end_head, 0)
    node -= tl.where(is_other, end_head, 0).to(tl.int64) * num_rows * (CHUNK // SIZE)
    start = tl.load(start_ptr + row)
    count = tl.load(length_ptr + row) - (node % (CHUNK // SIZE)).to(tl.int32) * SIZE
    count = tl.minimum(tl.maximum(count, 0), SIZE)
    x_ptr += head // num_heads * stride_xb + head % num_heads * stride_xh
    order_ptr += node * SIZE
    places = tl.arange(0, SIZE)
    is_split_twice = cluster * 4 <= SIZE
    if count > (HALF // 2 if is_split_twice else HALF):
        gram = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, count, TILE):
            some = first + tl.arange(0, TILE)
            tokens = _node_tokens(order_ptr, start, some, count, IS_FIRST_LEVEL)
            x = _member_rows(x_ptr, tokens, some < count, stride_xn, HEAD_DIM, BLOCK_D)  # [TILE, BLOCK_D]
            gram = tl.dot(tl.trans(x), x, gram, input_precision="ieee")
            total += tl.sum(x.to(tl.float32), axis=0)
        mean = total / count
        covariance = gram - total[:, None] * mean[None, :]  # [BLOCK_D, BLOCK_D], times the number of members
        mean /= _largest(mean)
        direction = _direction(covariance, mean, mean, BLOCK_D, False)
        second = direction
        if is_split_twice:
            mean -= direction * tl.sum(mean * direction)
            second = _direction(covariance, mean, direction, BLOCK_D, True)
        for first in range(0, count, TILE):
            some = first + tl.arange(0, TILE)
            tokens = _node_tokens(order_ptr, start, some, count, IS_FIRST_LEVEL)
            x = _member_rows(x_ptr, tokens, some < count, stride_xn, HEAD_DIM, BLOCK_D).to(tl.float32)
            tl.store(projection_ptr + some, tl.sum(x * direction[None, :], axis=1))
            if is_split_twice:
                tl.store(second_ptr + some, tl.sum(x * second[None, :], axis=1))
        tl.debug_barrier()
        place = places[None, :]
        projection = tl.load(projection_ptr + place, mask=place < count, other=0.0)
        second_projection = tl.load(second_ptr + place, mask=(place < count) & is_split_twice, other=0.0)
        tokens = _node_tokens(order_ptr, start, place, count, IS_FIRST_LEVEL)
        place = _places(projection, place, place < count, SIZE)
        # Every token is loaded before one is stored.
        tl.debug_barrier()
        tl.store(order_ptr + place, tokens)
        if is_split_twice:
            tl.store(projection_ptr + place, projection)
            tl.store(second_ptr + place, second_projection)
            tl.debug_barrier()
            half = tl.arange(0, 2)[:, None] * HALF + tl.arange(0, HALF)[None, :]
            is_member = half < count
            by_first = tl.load(projection_ptr + half, mask=is_member, other=0.0)
            by_second = tl.load(second_ptr + half, mask=is_member, other=0.0)
            half_tokens = tl.load(order_ptr + half)
            is_first = _variance(by_first, is_member) > _variance(by_second, is_member)
            by_either = tl.where(is_first[:, None], by_first, by_second)
            quarter = _places(by_either, half, is_member, HALF)
            tl.debug_barrier()
            tl.store(order_ptr + quarter, half_tokens)
    elif IS_FIRST_LEVEL:
        tl.store(order_ptr + places, _node_tokens(order_ptr, start, places, count, IS_FIRST_LEVEL))


@triton.jit(do_not_specialize=["clusters_per_head"])
def muse_cluster_means(
    x_ptr,
    order_ptr,
    mean_ptr,
    wide_mean_ptr,
    mean_square_ptr,
    stride_xb,
    stride_xh,
    stride_xn,
    num_heads,
    clusters_per_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLUSTER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean of each cluster's members and of their |x|^2, one program each: order [B, H, clusters, CLUSTER]."""
    cluster = tl.program_id(0).to(tl.int64)
    head = cluster // clusters_per_head
    x_ptr += head // num_heads * stride_xb + head % num_heads * stride_xh
    total = tl.zeros([BLOCK_D], tl.float32)
    square = 0.0
    count = 0
    for first in range(0, CLUSTER, TILE):
        tokens = tl.load(order_ptr + cluster * CLUSTER + first + tl.arange(0, TILE))
        x = _member_rows(x_ptr, tokens, tokens >= 0, stride_xn, HEAD_DIM, BLOCK_D)  # [TILE, BLOCK_D]
        total += tl.sum(x.to(tl.float32), axis=0)
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32))
        count += tl.sum((tokens >= 0).to(tl.int32))
    d = tl.arange(0, BLOCK_D)
    mean = (total / tl.maximum(count, 1)).to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + cluster * HEAD_DIM + d, mean, mask=d < HEAD_DIM)
    tl.store(wide_mean_ptr + cluster * HEAD_DIM + d, mean.to(tl.float32), mask=d < HEAD_DIM)
    tl.store(mean_square_ptr + cluster, square / tl.maximum(count, 1))


def _tile(size: int, x: Tensor) -> int:
    """Rows of a tile, from what an H100 was fastest with; fewer where the covariance leaves no registers for more."""
    most = 128 if x.element_size() == 2 else 2**12 // padded_head_dim(x.shape[-1])
    return max(16, min(size // 2, most))


def spatial_order(x: Tensor, table: ChunkTable, chunk: int) -> Tensor:
    """Contiguous runs as clusters: int32 [B, H, C, chunk] for x [B, H, N, D], -1 after a row's last token."""
    places = torch.arange(chunk, dtype=torch.int32, device=x.device)
    order = torch.where(places < table.length[:, None], table.start[:, None] + places, -1)
    return order.expand(*x.shape[:2], -1, -1).contiguous()


def bisection_orders(inputs: Sequence[tuple[Tensor, int]], table: ChunkTable, chunk: int) -> list[Tensor]:
    """Balanced clusters by recursive bisection in every row of the chunk table.

    Args:
        inputs: one or two pairs of x [B, H, N, D], float32, bfloat16 or float16, any strides, and the tokens of its
            clusters. x differ in heads alone, and are split by the same launches.
        chunk, clusters: powers of two, clusters at least 16.
    Returns:
        For each, int32 [B, H, C, chunk] as in MuseClusters.
    """
    inputs = [(rows_contiguous(x), cluster) for x, cluster in inputs]
    head_dim = inputs[0][0].shape[-1]
    if head_dim > LARGEST_HEAD_DIM:
        return [bisected(x.float(), spatial_order(x, table, chunk), cluster) for x, cluster in inputs]
    if any(cluster == chunk for _, cluster in inputs):
        rest = [(x, cluster) for x, cluster in inputs if cluster < chunk]
        split = iter(bisection_orders(rest, table, chunk) if rest else [])
        return [next(split) if cluster < chunk else spatial_order(x, table, chunk) for x, cluster in inputs]
    num_rows, device = table.start.shape[0], table.start.device
    orders = [torch.empty(*x.shape[:2], num_rows, chunk, dtype=torch.int32, device=device) for x, _ in inputs]
    projections = torch.empty(2, sum(order.numel() for order in orders), dtype=torch.float32, device=device)
    size = chunk if projections.numel() > 0 else 0
    # Those with the smaller clusters come last, alone in the last levels.
    parts = sorted(zip(inputs, orders, strict=True), key=lambda part: -part[0][1])
    while parts := [part for part in parts if part[0][1] < size]:
        arguments = [(x, order, cluster, *x.stride()[:3], x.shape[1]) for (x, cluster), order in parts]
        places = sum(order.numel() for _, order in parts)
        x, first = parts[0][0][0], parts[0][1]
        muse_cluster_split[(places // size,)](
            *arguments[0],
            *arguments[-1],
            *projections,
            table.start,
            table.length,
            first.shape[0] * first.shape[1],
            num_rows,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            CHUNK=chunk,
            SIZE=size,
            TILE=_tile(size, x),
            num_warps=4,
        )
        size //= 4
    return orders


def cluster_orders(q: Tensor, k: Tensor, table: ChunkTable, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    """Token orders that make the clusters of q [B, H, N, D] and k [B, H_kv, N, D]: int32 [B, H or H_kv, C, chunk]."""
    inputs = [
        (q, options.query_cluster if options.query_clustering == "semantic" else options.chunk),
        (k, options.key_cluster if options.key_clustering == "semantic" else options.chunk),
    ]
    query_order, key_order = bisection_orders(inputs, table, options.chunk)
    return query_order, key_order


class ClusterMeans(NamedTuple):
    """What is known of clusters of x [B, H, N, D]; 0 for an empty one."""

    mean: Tensor
    """[B, H, C, chunk / cluster, D], dtype of x."""
    wide_mean: Tensor
    """The same numbers in float32."""
    mean_square: Tensor
    """float32 [B, H, C, chunk / cluster]: mean of |x|^2."""


def cluster_means(x: Tensor, order: Tensor, cluster: int) -> ClusterMeans:
    """Means of the members of each cluster in an order int32 [B, H, C, chunk]."""
    x = rows_contiguous(x)
    batch, heads, _, head_dim = x.shape
    num_rows, chunk = order.shape[2:]
    shape = (batch, heads, num_rows, chunk // cluster)
    means = ClusterMeans(
        torch.empty(*shape, head_dim, dtype=x.dtype, device=x.device),
        torch.empty(*shape, head_dim, dtype=torch.float32, device=x.device),
        torch.empty(shape, dtype=torch.float32, device=x.device),
    )
    if means.mean.numel() > 0:
        muse_cluster_means[(order.numel() // cluster,)](
            x,
            order,
            *means,
            *x.stride()[:3],
            heads,
            num_rows * (chunk // cluster),
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            CLUSTER=cluster,
            TILE=_tile(cluster, x),
            num_warps=4,
        )
    return means
