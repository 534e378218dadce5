"""Stage 1: every far key cluster as each query cluster sees it.

    A_ab = logsumexp_{j in b}(scale mu_a . k_j)     p_j = exp(scale mu_a . k_j - A_ab)
    kbar_ab = sum_j p_j k_j                         vbar_ab = sum_j p_j v_j
    bias_ab = A_ab - scale mu_a . kbar_ab           so that logit_ab(q) = scale q . kbar_ab + bias_ab

with mu . kbar_ab = sum_j p_j (mu . k_j), for p as rounded for the products; order 0: bias_ab = A_ab, the whole logit.
The bias of what a may not see is -inf.
First choice of clusters to retrieve (`selection.py`), where it does not take all queries:

    score_ab = scale mean_q . kbar_ab + bias_ab + log spread_b                      (selection "centroid")
    score_ab = scale mean_q . kbar_ab + bias_ab + |scale q|^2 spread_b / (4 D)      (selection "peak_mass")

The kernel holds the matrix of one key cluster against a tile of query clusters, however many chunks it spans. The way
back to the keys is in `key_gradients.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, Group
from muse_kernels.attention.common import LOG2E, NEGATIVE, operand, padded_head_dim
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.tiles import tile_of


class SummaryLayout(NamedTuple):
    """Where the summaries of a row of the chunk table lie in the workspace; all [C], on the device.

    Query cluster i of row r sees key clusters first_cluster[r] .. + num_far[r]. Its summary of the first lies at
    offset[r] + i * num_far[r], counted from the first row of the group of rows at hand.
    """

    first_cluster: Tensor
    """int32: number of the document's first key cluster."""
    num_far: Tensor
    """int32: key clusters in earlier chunks (bidirectional: in all chunks, the own chunk's are switched off)."""
    offset: Tensor
    """int64"""
    length: Tensor
    """int32: tokens in the row's chunk."""
    end: Tensor
    """int32: one past the last row of the document."""


def summary_layout(table: ChunkTable, options: ResolvedOptions) -> SummaryLayout:
    """The layout for the rows of a chunk table."""
    rows = torch.arange(table.first.shape[0], dtype=torch.int32, device=table.first.device)
    num_far = ((rows if options.causal else table.end) - table.first) * options.key_clusters
    sizes = num_far.long() * options.query_clusters
    return SummaryLayout(
        table.first * options.key_clusters, num_far, torch.cumsum(sizes, 0) - sizes, table.length, table.end
    )


def summaries_per_row(row: int, num_tokens: int, options: ResolvedOptions) -> int:
    """The most summaries a row of the chunk table can need, per query head: known without looking at documents."""
    chunks = -(-num_tokens // options.chunk)
    far_chunks = min(row, chunks - 1) if options.causal else chunks
    return options.query_clusters * far_chunks * options.key_clusters


class Summaries(NamedTuple):
    """The summaries of a group of rows, for the query heads [heads] of a group of key-value heads.

    The backward pass writes the gradients of kbar and vbar over them.
    """

    kbar: Tensor
    """[heads, capacity, padded D]"""
    vbar: Tensor
    """[heads, capacity, padded D]"""
    bias: Tensor
    """float32 [heads, capacity], base 2."""


class FirstChoice(NamedTuple):
    """What scores are made of, and where they go."""

    mean: Tensor
    """Means of query clusters, [B, H, C, chunk / query_cluster, D], dtype of k."""
    mean_square: Tensor
    """float32 [B, H, C, chunk / query_cluster]: mean of |q|^2, before scaling."""
    spread: Tensor
    """float32 [heads, C * chunk / key_cluster]: trace of the covariance of each cluster's keys."""
    scores: Tensor
    """float32 [query heads, capacity], base 2; -inf for clusters out of sight."""


@triton.jit
def log2_of_spread(spread):
    """A spread of 0 ranks last, but still before a cluster out of sight: it counts as the smallest normal number."""
    return tl.log2(tl.maximum(spread, 1.1754944e-38))


@triton.jit
def cluster_softmax(mu, k, num_keys, scale_log2, K: tl.constexpr, CAUSAL: tl.constexpr):
    """Weights p [A, K], log-mass [A] and logits [A, K], base 2. Only key clusters of a causal far chunk are full."""
    logits = tl.dot(mu, tl.trans(k), input_precision="ieee") * scale_log2
    if not CAUSAL:
        logits = tl.where((tl.arange(0, K) < num_keys)[None, :], logits, float("-inf"))
    largest = tl.maximum(tl.max(logits, 1), NEGATIVE)
    weights = tl.exp2(logits - largest[:, None])
    mass = tl.sum(weights, 1)
    weights = weights * (1 / tl.where(mass > 0.0, mass, 1.0))[:, None]
    return weights, largest + tl.log2(mass), logits


@triton.jit(do_not_specialize=["first_row", "end_row", "num_rows", "first_head", "capacity"])
def muse_summaries(
    mu,
    mean,
    mean_square,
    spread,
    scores,
    clustered_k,
    clustered_v,
    kbar,
    vbar,
    bias,
    first_cluster,
    num_far,
    offset,
    length,
    first_row,
    end_row,
    num_rows,
    first_head,
    capacity,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
    A: tl.constexpr,
    CLUSTERS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ORDER: tl.constexpr,
    SCORE: tl.constexpr,
    MEAN_IS_MU: tl.constexpr,
):
    """One program for each tile of A query clusters and run of CLUSTERS key clusters."""
    local_head = tl.program_id(2)
    a = first_row * QUERY_CLUSTERS + tl.program_id(0) * A + tl.arange(0, A)
    is_query_cluster = a < end_row * QUERY_CLUSTERS
    row = tl.minimum(a // QUERY_CLUSTERS, end_row - 1)
    row_first = tl.load(first_cluster + row)
    row_far = tl.where(is_query_cluster, tl.load(num_far + row), 0)
    base = tl.load(offset + row) - tl.load(offset + first_row) + (a % QUERY_CLUSTERS) * row_far - row_first
    # Half of the largest integer, so that a tile without any far cluster does not overflow into one.
    start = tl.min(tl.where(row_far > 0, row_first, 1073741824)) + tl.program_id(1) * CLUSTERS
    stop = tl.minimum(tl.max(tl.where(row_far > 0, row_first + row_far, 0)), start + CLUSTERS)
    if start >= stop:
        return

    d = tl.arange(0, BLOCK_D)
    head = (first_head * G + local_head).to(tl.int64)
    mu_rows = operand(
        tl.load(
            mu + (head * num_rows * QUERY_CLUSTERS + a)[:, None] * D + d[None, :],
            mask=is_query_cluster[:, None] & (d < D)[None, :],
            other=0.0,
        )
    )
    if SCORE == "peak_mass":
        square = tl.load(mean_square + head * num_rows * QUERY_CLUSTERS + a, mask=is_query_cluster, other=0.0)
        square *= scale_log2 * scale_log2 / (4 * D * LOG2E)
    first_key = (local_head // G).to(tl.int64) * num_rows * KEY_CLUSTERS * K * BLOCK_D
    clustered_k, clustered_v = clustered_k + first_key, clustered_v + first_key
    summaries = local_head.to(tl.int64) * capacity + base
    for cluster in range(start, stop):
        keys = (cluster * K + tl.arange(0, K))[:, None] * BLOCK_D + d[None, :]
        k = operand(tl.load(clustered_k + keys))
        v = operand(tl.load(clustered_v + keys))
        num_keys = tl.load(length + cluster // KEY_CLUSTERS) - (cluster % KEY_CLUSTERS) * K
        weights, log_mass, logits = cluster_softmax(mu_rows, k, num_keys, scale_log2, K, CAUSAL)
        weights = weights.to(k.dtype)
        is_stored = (cluster >= row_first) & (cluster < row_first + row_far)
        place = summaries + cluster
        # All that needs the logits comes before the products, whose results fill the registers.
        if SCORE != "none":
            score = log_mass
            if not MEAN_IS_MU:
                means = mean + (head * num_rows * QUERY_CLUSTERS + a)[:, None] * D + d[None, :]
                means = operand(tl.load(means, mask=is_query_cluster[:, None] & (d < D)[None, :], other=0.0))
                from_mu = tl.dot(means - mu_rows, tl.trans(k), input_precision="ieee") * scale_log2
                score += tl.sum(weights.to(tl.float32) * from_mu, 1)
            key_spread = tl.load(spread + local_head // G * num_rows * KEY_CLUSTERS + cluster)
            if SCORE == "centroid":
                score += log2_of_spread(key_spread)
            else:
                score += square * key_spread
        if ORDER == 1:
            at_mu = weights.to(tl.float32) * logits  # sums to scale mu . kbar
            log_mass -= tl.sum(at_mu if CAUSAL else tl.where(weights > 0.0, at_mu, 0.0), 1)
        if not CAUSAL:
            is_far = (cluster // KEY_CLUSTERS != row) & (num_keys > 0)
            log_mass = tl.where(is_far, log_mass, float("-inf"))
            if SCORE != "none":
                score = tl.where(is_far, score, float("-inf"))
        tl.store(bias + place, log_mass, mask=is_stored)
        if SCORE != "none":
            tl.store(scores + place, score, mask=is_stored)
        rows = place[:, None] * BLOCK_D + d[None, :]
        key_mean = tl.dot(weights, k, input_precision="ieee").to(kbar.dtype.element_ty)
        tl.store(kbar + rows, key_mean, mask=is_stored[:, None])
        value_mean = tl.dot(weights, v, input_precision="ieee").to(vbar.dtype.element_ty)
        tl.store(vbar + rows, value_mean, mask=is_stored[:, None])


def summaries(
    mu: Tensor,
    clustered_k: Tensor,
    clustered_v: Tensor,
    summary: Summaries,
    layout: SummaryLayout,
    group: Group,
    options: ResolvedOptions,
    first_choice: FirstChoice | None = None,
) -> None:
    """Write the summaries that a group of rows and key-value heads needs.

    Args:
        mu: [B, H, C, chunk / query_cluster, D], dtype of k, not scaled.
        clustered_k, clustered_v: [heads, C * chunk, padded D], of these key-value heads alone.
        summary: buffers of at least the capacity that `summaries_per_row` gives for these rows.
        first_choice: also write scores; None if nobody needs them.
    """
    num_rows, head_dim = layout.num_far.shape[0], mu.shape[-1]
    group_size = summary.kbar.shape[0] // group.num_heads
    tile = tile_of("summaries", clustered_k)
    far_rows = group.rows.stop - 1 if options.causal else num_rows
    grid = (
        triton.cdiv(group.num_rows * options.query_clusters, tile["A"]),
        triton.cdiv(far_rows * options.key_clusters, tile["CLUSTERS"]),
        summary.kbar.shape[0],
    )
    muse_summaries[grid](
        mu,
        *(first_choice or (mu, summary.bias, summary.bias, summary.bias)),
        clustered_k,
        clustered_v,
        *summary,
        layout.first_cluster,
        layout.num_far,
        layout.offset,
        layout.length,
        group.rows.start,
        group.rows.stop,
        num_rows,
        group.heads.start,
        summary.bias.shape[1],
        options.softmax_scale * LOG2E.value,
        G=group_size,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        K=options.key_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        KEY_CLUSTERS=options.key_clusters,
        CAUSAL=options.causal,
        ORDER=options.order,
        SCORE="none" if first_choice is None else options.selection,
        MEAN_IS_MU=options.expansion == "centroid",
        **tile,
    )
