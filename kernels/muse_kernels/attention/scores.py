"""The first look at every far key cluster: what it weighs for the mean of a query cluster.

    A_ab = logsumexp_{j in b}(scale mean_q . k_j)                 mean_q over the queries of a, rounded as q is

    score_ab = A_ab + log spread_b                                (selection "centroid")
    score_ab = A_ab + |scale q|^2 spread_b / (4 D)                (selection "peak_mass", |q|^2 its mean over a)

The clusters with the largest scores are retrieved, or looked at key by key before that (`selection.py`).
"""

import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, Group
from muse_kernels.attention.clustering import ClusterMeans
from muse_kernels.attention.common import LOG2E, NEGATIVE, operand, padded_head_dim
from muse_kernels.attention.layout import FarLayout, far_run
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.tiles import tile_of


@triton.jit
def log2_of_spread(spread):
    """A spread of 0 ranks last, but still before a cluster out of sight: it counts as the smallest normal number."""
    return tl.log2(tl.maximum(spread, 1.1754944e-38))


@triton.jit(do_not_specialize=["first_row", "end_row", "num_rows", "first_head", "capacity"])
def muse_scores(
    mean,
    mean_square,
    clustered_k,
    spread,
    scores,
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
    BY_CENTROID: tl.constexpr,
):
    """One program for each tile of A query clusters and run of CLUSTERS key clusters."""
    local_head = tl.program_id(2)
    a, is_query_cluster, row, row_first, row_far, place, start, stop = far_run(
        first_cluster, num_far, offset, first_row, end_row, local_head, capacity, QUERY_CLUSTERS, A, CLUSTERS
    )
    if start >= stop:
        return

    d, key = tl.arange(0, BLOCK_D), tl.arange(0, K)
    number = (first_head * G + local_head).to(tl.int64) * num_rows * QUERY_CLUSTERS + a
    is_mean = is_query_cluster[:, None] & (d < D)[None, :]
    means = operand(tl.load(mean + number[:, None] * D + d[None, :], mask=is_mean, other=0.0))
    square = tl.load(mean_square + number, mask=is_query_cluster, other=0.0)
    square *= scale_log2 * scale_log2 / (4 * D * LOG2E)
    kv_head = (local_head // G).to(tl.int64)
    clustered_k += kv_head * num_rows * KEY_CLUSTERS * K * BLOCK_D
    spread += kv_head * num_rows * KEY_CLUSTERS
    scores += place
    for cluster in range(start, stop):
        k = operand(tl.load(clustered_k + (cluster * K + key)[:, None] * BLOCK_D + d[None, :]))
        logits = tl.dot(means, tl.trans(k), input_precision="ieee") * scale_log2
        if not CAUSAL:
            num_keys = tl.load(length + cluster // KEY_CLUSTERS) - (cluster % KEY_CLUSTERS) * K
            is_seen = (key < num_keys)[None, :] & (cluster // KEY_CLUSTERS != row)[:, None]
            logits = tl.where(is_seen, logits, float("-inf"))
        largest = tl.maximum(tl.max(logits, 1), NEGATIVE)
        score = largest + tl.log2(tl.sum(tl.exp2(logits - largest[:, None]), 1))
        key_spread = tl.load(spread + cluster)
        score += log2_of_spread(key_spread) if BY_CENTROID else square * key_spread
        is_stored = (cluster >= row_first) & (cluster < row_first + row_far)
        tl.store(scores + cluster, score, mask=is_stored)


def score_clusters(
    means: ClusterMeans,
    clustered_k: Tensor,
    spread: Tensor,
    scores: Tensor,
    layout: FarLayout,
    table: ChunkTable,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Write the scores of all key clusters that a group of rows and key-value heads sees.

    Args:
        means: of query clusters.
        clustered_k: [heads, C * chunk, padded D], of these key-value heads alone.
        spread: float32 [heads, C * chunk / key_cluster]: trace of the covariance of each cluster's keys.
        scores: float32 [query heads, capacity], base 2; -inf for clusters out of sight.
        layout: of key clusters.
    """
    num_rows, head_dim = table.start.shape[0], means.mean.shape[-1]
    tile = tile_of("scores", clustered_k)
    far_rows = group.rows.stop - 1 if options.causal else num_rows
    grid = (
        triton.cdiv(group.num_rows * options.query_clusters, tile["A"]),
        triton.cdiv(far_rows * options.key_clusters, tile["CLUSTERS"]),
        scores.shape[0],
    )
    muse_scores[grid](
        means.mean,
        means.mean_square,
        clustered_k,
        spread,
        scores,
        *layout,
        table.length,
        group.rows.start,
        group.rows.stop,
        num_rows,
        group.heads.start,
        scores.shape[1],
        options.softmax_scale * LOG2E.value,
        G=scores.shape[0] // group.num_heads,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        K=options.key_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        KEY_CLUSTERS=options.key_clusters,
        CAUSAL=options.causal,
        BY_CENTROID=options.selection == "centroid",
        **tile,
    )
