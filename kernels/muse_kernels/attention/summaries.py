"""Stage 1: runs of far keys as each query cluster sees them, without the keys that it retrieves.

    A_aB = logsumexp_{j in B}(scale mu_a . k_j)     p_j = exp(scale mu_a . k_j - A_aB)     j in no cluster of R(a)
    kbar_aB = sum_j p_j k_j                         vbar_aB = sum_j p_j v_j
    bias_aB = A_aB - scale mu_a . kbar_aB           so that logit_aB(q) = scale q . kbar_aB + bias_aB

with kbar_aB as rounded; order 0: bias_aB = A_aB, the whole logit. The bias of what a may not see is -inf, and A_aB of
what it retrieves whole. B is `summary_cluster` keys: key clusters that lie together in the tree of bisections.

The kernel is attention of a tile of mu, however many chunks it spans, to the key clusters of B one after the other,
with keys and values both for values. The way back to the keys is in `key_gradients.py`.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, Group
from muse_kernels.attention.common import LOG2E, NEGATIVE, operand, padded_head_dim
from muse_kernels.attention.layout import FarLayout, far_run
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.tiles import tile_of


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
    log_mass: Tensor
    """float32 [heads, capacity], base 2: A."""
    retrieved: Tensor
    """int32 [heads, capacity]: a bit for each key cluster of the summary that is retrieved, and not in it."""


@triton.jit
def _retrieved_bits(entries, top_k, is_query_cluster, summary, PER_SUMMARY: tl.constexpr):
    """A bit for each key cluster of a summary that a query cluster retrieves: int32 [A]. entries: its list, [A]."""
    bits = tl.zeros(entries.shape, tl.int32)
    for first in range(0, top_k, 16):
        place = first + tl.arange(0, 16)
        mask = is_query_cluster[:, None] & (place < top_k)[None, :]
        cluster = tl.load(entries[:, None] + place[None, :], mask=mask, other=-1)
        is_inside = (cluster >= 0) & (cluster // PER_SUMMARY == summary)
        # A list holds a cluster once: the sum of different powers of two.
        bits += tl.sum(tl.where(is_inside, tl.full([], 1, tl.int32) << (cluster % PER_SUMMARY), 0), 1)
    return bits


@triton.jit(do_not_specialize=["first_row", "end_row", "num_rows", "first_head", "capacity", "top_k"])
def muse_summaries(
    mu,
    selected,
    clustered_k,
    clustered_v,
    kbar,
    vbar,
    bias,
    log_masses,
    retrieved,
    first_summary,
    num_far,
    offset,
    length,
    first_row,
    end_row,
    num_rows,
    first_head,
    capacity,
    top_k,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    SUMMARIES: tl.constexpr,
    PER_SUMMARY: tl.constexpr,
    A: tl.constexpr,
    RUN: tl.constexpr,
    CAUSAL: tl.constexpr,
    ORDER: tl.constexpr,
):
    """One program for each tile of A query clusters and run of RUN summaries."""
    local_head = tl.program_id(2)
    a, is_query_cluster, row, row_first, row_far, place, start, stop = far_run(
        first_summary, num_far, offset, first_row, end_row, local_head, capacity, QUERY_CLUSTERS, A, RUN
    )
    if start >= stop:
        return

    d, key = tl.arange(0, BLOCK_D), tl.arange(0, K)
    number = (first_head * G + local_head).to(tl.int64) * num_rows * QUERY_CLUSTERS + a
    is_mu = is_query_cluster[:, None] & (d < D)[None, :]
    mu_rows = operand(tl.load(mu + number[:, None] * D + d[None, :], mask=is_mu, other=0.0))
    first_key = (local_head // G).to(tl.int64) * num_rows * SUMMARIES * PER_SUMMARY * K * BLOCK_D
    clustered_k, clustered_v = clustered_k + first_key, clustered_v + first_key
    for summary in range(start, stop):
        bits = _retrieved_bits(selected + number * top_k, top_k, is_query_cluster, summary, PER_SUMMARY)
        if not CAUSAL:  # in a causal far chunk every place has a key
            num_keys = tl.load(length + summary // SUMMARIES) - (summary % SUMMARIES) * (PER_SUMMARY * K)
        largest, mass = tl.full([A], NEGATIVE, tl.float32), tl.zeros([A], tl.float32)
        key_mean = tl.zeros([A, BLOCK_D], tl.float32)
        value_mean = tl.zeros([A, BLOCK_D], tl.float32)
        for leaf in range(PER_SUMMARY):
            keys = ((summary * PER_SUMMARY + leaf) * K + key)[:, None] * BLOCK_D + d[None, :]
            k = operand(tl.load(clustered_k + keys))
            v = operand(tl.load(clustered_v + keys))
            logits = tl.dot(mu_rows, tl.trans(k), input_precision="ieee") * scale_log2
            is_left = (((bits >> leaf) & 1) == 0)[:, None]
            if not CAUSAL:
                is_left &= (leaf * K + key < num_keys)[None, :]
            logits = tl.where(is_left, logits, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            rescale = tl.exp2(largest - new_largest)
            weights = tl.exp2(logits - new_largest[:, None])
            largest, mass = new_largest, mass * rescale + tl.sum(weights, 1)
            weights = weights.to(k.dtype)
            key_mean = tl.dot(weights, k, key_mean * rescale[:, None], input_precision="ieee")
            value_mean = tl.dot(weights, v, value_mean * rescale[:, None], input_precision="ieee")
        log_mass = largest + tl.log2(mass)
        share = (1 / tl.where(mass > 0.0, mass, 1.0))[:, None]
        key_mean = (key_mean * share).to(kbar.dtype.element_ty)
        value_mean = (value_mean * share).to(vbar.dtype.element_ty)
        logit_at_0 = log_mass
        if ORDER == 1:
            logit_at_0 -= tl.sum(mu_rows.to(tl.float32) * key_mean.to(tl.float32), 1) * scale_log2
        if not CAUSAL:
            logit_at_0 = tl.where((summary // SUMMARIES != row) & (num_keys > 0), logit_at_0, float("-inf"))
        is_stored = (summary >= row_first) & (summary < row_first + row_far)
        entry = place + summary
        tl.store(bias + entry, logit_at_0, mask=is_stored)
        tl.store(log_masses + entry, log_mass, mask=is_stored)
        tl.store(retrieved + entry, bits, mask=is_stored)
        rows = entry[:, None] * BLOCK_D + d[None, :]
        tl.store(kbar + rows, key_mean, mask=is_stored[:, None])
        tl.store(vbar + rows, value_mean, mask=is_stored[:, None])


def summaries(
    mu: Tensor,
    selected: Tensor,
    clustered_k: Tensor,
    clustered_v: Tensor,
    summary: Summaries,
    layout: FarLayout,
    table: ChunkTable,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Write the summaries that a group of rows and key-value heads needs.

    Args:
        mu: [B, H, C, chunk / query_cluster, D], dtype of k, not scaled.
        selected: int32 [B, H, C, chunk / query_cluster, top_k].
        clustered_k, clustered_v: [heads, C * chunk, padded D], of these key-value heads alone.
        summary: buffers.
        layout: of summaries.
    """
    num_rows, head_dim = table.start.shape[0], mu.shape[-1]
    tile = tile_of("summaries", clustered_k)
    tile["RUN"] = max(1, tile.pop("CLUSTERS") // options.key_clusters_per_summary)
    far_rows = group.rows.stop - 1 if options.causal else num_rows
    grid = (
        triton.cdiv(group.num_rows * options.query_clusters, tile["A"]),
        triton.cdiv(far_rows * options.summaries, tile["RUN"]),
        summary.kbar.shape[0],
    )
    muse_summaries[grid](
        mu,
        selected,
        clustered_k,
        clustered_v,
        *summary,
        *layout,
        table.length,
        group.rows.start,
        group.rows.stop,
        num_rows,
        group.heads.start,
        summary.bias.shape[1],
        options.top_k,
        options.softmax_scale * LOG2E.value,
        G=summary.kbar.shape[0] // group.num_heads,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        K=options.key_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        SUMMARIES=options.summaries,
        PER_SUMMARY=options.key_clusters_per_summary,
        CAUSAL=options.causal,
        ORDER=options.order,
        **tile,
    )
