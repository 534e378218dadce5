"""Which far key clusters a query cluster attends exactly, and who attends each of them.

    L'_q = log( exp(near lse_q) + sum_b exp(logit_ab(q)) )
    score_ab = log sum_{q in a} exp(logit_ab(q) - L'_q) + log spread_b      (selection "query_mass")
    score_ab = logit_ab(mean of q) + log spread_b                           (selection "centroid")
    R(a) = the top_k clusters with the largest score, ties to the earlier one

The two passes over the summaries of one query cluster are one kernel: the second reads them from the cache. The top_k
are found by bisecting the bits of the score, so that neither top_k nor the number of clusters is built into the kernel.
The inverted lists that the backward pass needs are a stable sort of (key cluster, query cluster) pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.common import LOG2E, operand, padded_head_dim, rows_contiguous
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.summaries import Summaries, SummaryLayout
from muse_kernels.attention.tiles import tile_of


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_head", "num_heads", "num_tokens", "capacity"])
def muse_scores(
    q,
    near_lse,
    query_order,
    mu,
    kbar,
    bias,
    log_spread,
    scores,
    first_cluster,
    num_far,
    offset,
    q_stride_batch,
    q_stride_head,
    q_stride_token,
    num_rows,
    first_row,
    first_head,
    num_heads,
    num_tokens,
    capacity,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    BY_CENTROID: tl.constexpr,
):
    """One program for each query cluster: the scores of all its far key clusters."""
    a, local_head = tl.program_id(0), tl.program_id(1)
    row = first_row + a // QUERY_CLUSTERS
    columns = tl.load(num_far + row)
    head = (first_head * G + local_head).to(tl.int64)
    first_place = (head * num_rows + first_row) * (QUERY_CLUSTERS * Q) + a.to(tl.int64) * Q
    token = tl.load(query_order + first_place + tl.arange(0, Q)).to(tl.int64)
    is_query = token >= 0
    num_queries = tl.sum(is_query.to(tl.int32))
    if (columns == 0) | (num_queries == 0):
        return

    d = tl.arange(0, BLOCK_D)
    q_rows = tl.load(
        q
        + (head // num_heads) * q_stride_batch
        + (head % num_heads) * q_stride_head
        + token[:, None] * q_stride_token
        + d[None, :],
        mask=is_query[:, None] & (d < D)[None, :],
        other=0.0,
    )
    q_rows = operand(q_rows)
    base = local_head.to(tl.int64) * capacity + tl.load(offset + row) - tl.load(offset + first_row)
    base += (a % QUERY_CLUSTERS) * columns
    kbar, bias, scores = kbar + base * BLOCK_D, bias + base, scores + base
    spread = log_spread + (local_head // G).to(tl.int64) * num_rows * KEY_CLUSTERS + tl.load(first_cluster + row)

    if BY_CENTROID:
        point = tl.sum(q_rows.to(tl.float32), 0) / num_queries
        if ORDER == 0:
            mu_rows = mu + ((head * num_rows + first_row) * QUERY_CLUSTERS + a) * D + d
            point -= tl.load(mu_rows, mask=d < D, other=0.0).to(tl.float32)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            is_column = column < columns
            key_mean = tl.load(kbar + column[:, None] * BLOCK_D + d[None, :], mask=is_column[:, None], other=0.0)
            logit = tl.sum(key_mean.to(tl.float32) * point[None, :], 1) * scale_log2
            logit += tl.load(bias + column, mask=is_column, other=float("-inf"))
            logit += tl.load(spread + column, mask=is_column, other=0.0)
            tl.store(scores + column, logit, mask=is_column)
    else:
        # An empty place gets an infinite normaliser: no share.
        largest = tl.load(near_lse + head * num_tokens + token, mask=is_query, other=float("inf")) * LOG2E
        mass = tl.full([Q], 1.0, tl.float32)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            is_column = column < columns
            logits = tl.load(bias + column, mask=is_column, other=float("-inf"))[None, :]
            if ORDER == 1:
                key_mean = tl.load(kbar + column[:, None] * BLOCK_D + d[None, :], mask=is_column[:, None], other=0.0)
                logits += tl.dot(q_rows, tl.trans(operand(key_mean)), input_precision="ieee") * scale_log2
            else:
                logits += tl.zeros([Q, COLUMNS], tl.float32)
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            rescale = tl.where(is_query, tl.exp2(largest - new_largest), 1.0)
            mass = mass * rescale + tl.sum(tl.exp2(logits - new_largest[:, None]), 1)
            largest = new_largest
        normaliser = largest + tl.log2(mass)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            is_column = column < columns
            log_mass = tl.load(bias + column, mask=is_column, other=float("-inf"))
            logits = log_mass[None, :]
            if ORDER == 1:
                key_mean = tl.load(kbar + column[:, None] * BLOCK_D + d[None, :], mask=is_column[:, None], other=0.0)
                logits += tl.dot(q_rows, tl.trans(operand(key_mean)), input_precision="ieee") * scale_log2
            share = tl.sum(tl.exp2(logits - normaliser[:, None]), 0)
            # A share too small for a float is still a choice, before a cluster out of sight.
            score = tl.log2(tl.maximum(share, 1.1754944e-38))
            score += tl.load(spread + column, mask=is_column, other=0.0)
            tl.store(scores + column, tl.where(log_mass > float("-inf"), score, float("-inf")), mask=is_column)


@triton.jit
def _ordered_bits(score):
    """Integers in the order of the scores, from 1 up; 0 for -inf and NaN, which nobody selects."""
    bits = score.to(tl.int32, bitcast=True)
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return tl.where(score > float("-inf"), bits, 0)


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_head", "capacity", "top_k"])
def muse_select(
    scores,
    query_order,
    selected,
    first_cluster,
    num_far,
    offset,
    num_rows,
    first_row,
    first_head,
    capacity,
    top_k,
    G: tl.constexpr,
    Q: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each query cluster: the numbers of its top_k key clusters, ascending."""
    a, local_head = tl.program_id(0), tl.program_id(1)
    row = first_row + a // QUERY_CLUSTERS
    columns = tl.load(num_far + row)
    head = (first_head * G + local_head).to(tl.int64)
    query_cluster = (head * num_rows + first_row) * QUERY_CLUSTERS + a
    if (columns == 0) | (tl.load(query_order + query_cluster * Q) < 0):
        return
    column = tl.arange(0, BLOCK)
    base = local_head.to(tl.int64) * capacity + tl.load(offset + row) - tl.load(offset + first_row)
    base += (a % QUERY_CLUSTERS) * columns
    threshold = tl.full([], 0, tl.int64)  # ends as the top_k-th largest, or as 0 where fewer are in sight
    for bit in range(32):
        candidate = threshold + (tl.full([], 2147483648, tl.int64) >> bit)
        count = tl.full([], 0, tl.int32)
        for first in range(0, columns, BLOCK):
            is_column = first + column < columns
            score = tl.load(scores + base + first + column, mask=is_column, other=float("-inf"))
            count += tl.sum((_ordered_bits(score) >= candidate).to(tl.int32))
        threshold = tl.where(count >= top_k, candidate, threshold)
    above = tl.full([], 0, tl.int32)
    for first in range(0, columns, BLOCK):
        is_column = first + column < columns
        score = tl.load(scores + base + first + column, mask=is_column, other=float("-inf"))
        above += tl.sum((_ordered_bits(score) > threshold).to(tl.int32))
    ties_left, num_selected = top_k - above, tl.full([], 0, tl.int32)
    for first in range(0, columns, BLOCK):
        is_column = first + column < columns
        score = tl.load(scores + base + first + column, mask=is_column, other=float("-inf"))
        bits = _ordered_bits(score)
        is_tie = (bits == threshold) & (threshold > 0)
        rank = tl.cumsum(is_tie.to(tl.int32), 0)
        is_selected = ((bits > threshold) | (is_tie & (rank <= ties_left))) & (bits > 0)
        place = num_selected + tl.cumsum(is_selected.to(tl.int32), 0) - 1
        tl.store(
            selected + query_cluster * top_k + place, tl.load(first_cluster + row) + first + column, mask=is_selected
        )
        ties_left -= tl.sum(is_tie.to(tl.int32))
        num_selected += tl.sum(is_selected.to(tl.int32))


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_head", "capacity", "top_k"])
def muse_switch_off(
    bias,
    selected,
    first_cluster,
    num_far,
    offset,
    num_rows,
    first_row,
    first_head,
    capacity,
    top_k,
    G: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each query cluster."""
    a, local_head = tl.program_id(0), tl.program_id(1)
    row = first_row + a // QUERY_CLUSTERS
    columns, row_first = tl.load(num_far + row), tl.load(first_cluster + row)
    head = (first_head * G + local_head).to(tl.int64)
    query_cluster = (head * num_rows + first_row) * QUERY_CLUSTERS + a
    base = local_head.to(tl.int64) * capacity + tl.load(offset + row) - tl.load(offset + first_row)
    base += (a % QUERY_CLUSTERS) * columns
    for first in range(0, top_k, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        column = tl.load(selected + query_cluster * top_k + entry, mask=entry < top_k, other=-1) - row_first
        tl.store(bias + base + column, float("-inf"), mask=(column >= 0) & (column < columns))


class InvertedLists(NamedTuple):
    """Who retrieves each key cluster of a group, cut into pieces of ENTRIES_PER_ITEM.

    The first piece of a list belongs to the key cluster's own program, every further one makes a partial result.
    """

    queries: Tensor
    """int32 [entries]: query clusters, counted from the group's first head and row, sorted by the key cluster."""
    start: Tensor
    """int32 [key clusters + 1]: where each key cluster's entries start; key clusters counted over the group's heads."""
    partial_start: Tensor
    """int32 [key clusters + 1]: how many partial results the key clusters before it have."""
    partial_owner: Tensor
    """int32 [partials]: the key cluster of each partial result; the number of key clusters where there is none."""


ENTRIES_PER_ITEM = 32
"""Query clusters that one program of `key_gradients` takes: what a cluster that everybody retrieves is cut into."""


def select_clusters(
    q: Tensor,
    near_lse: Tensor,
    query_order: Tensor,
    mu: Tensor,
    summary: Summaries,
    log_spread: Tensor,
    scores: Tensor,
    selected: Tensor,
    layout: SummaryLayout,
    rows: slice,
    heads: slice,
    options: ResolvedOptions,
) -> None:
    """Write R(a) of the query clusters of a group of rows and heads into `selected`, which is all -1 before.

    Args:
        q: [B, H, N, D]. near_lse: float32 [B, H, N], natural log. query_order: int32 [B, H, C, chunk].
        selected: int32 [B, H, C, chunk / query_cluster, top_k].
        log_spread: float32 [heads, C * chunk / key_cluster], base 2. scores: float32, shape of `summary.bias`.
        heads: key-value heads, counted over batch and heads together.
    """
    q = rows_contiguous(q)
    head_dim, num_rows = q.shape[-1], layout.num_far.shape[0]
    group_size = summary.kbar.shape[0] // (heads.stop - heads.start)
    grid = ((rows.stop - rows.start) * options.query_clusters, summary.kbar.shape[0])
    capacity = summary.bias.shape[1]
    muse_scores[grid](
        q,
        near_lse,
        query_order,
        mu,
        summary.kbar,
        summary.bias,
        log_spread,
        scores,
        *layout[:3],
        *q.stride()[:3],
        num_rows,
        rows.start,
        heads.start,
        q.shape[1],
        q.shape[2],
        capacity,
        options.softmax_scale * LOG2E.value,
        G=group_size,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        Q=options.query_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        KEY_CLUSTERS=options.key_clusters,
        ORDER=options.order,
        BY_CENTROID=options.selection == "centroid",
        **tile_of("scores", q),
    )
    muse_select[grid](
        scores,
        query_order,
        selected,
        *layout[:3],
        num_rows,
        rows.start,
        heads.start,
        capacity,
        options.top_k,
        G=group_size,
        Q=options.query_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        **tile_of("select", q),
    )


def switch_off_retrieved(
    summary: Summaries, selected: Tensor, layout: SummaryLayout, rows: slice, heads: slice, options: ResolvedOptions
) -> None:
    """Set the bias of retrieved clusters' summaries to -inf: their keys are attended instead."""
    muse_switch_off[((rows.stop - rows.start) * options.query_clusters, summary.kbar.shape[0])](
        summary.bias,
        selected,
        *layout[:3],
        layout.num_far.shape[0],
        rows.start,
        heads.start,
        summary.bias.shape[1],
        options.top_k,
        G=summary.kbar.shape[0] // (heads.stop - heads.start),
        QUERY_CLUSTERS=options.query_clusters,
        BLOCK=16,
        num_warps=1,
    )


def inverted_lists(selected: Tensor, num_key_clusters: int) -> InvertedLists:
    """Sort the pairs of a group by key cluster.

    Args:
        selected: int32 [key-value heads, G, rows, query clusters, top_k], numbers of key clusters, -1 for none.
        num_key_clusters: of one key-value head.
    """
    num_heads, top_k = selected.shape[0], selected.shape[-1]
    total = num_heads * num_key_clusters
    first = torch.arange(num_heads, dtype=torch.int32, device=selected.device) * num_key_clusters
    owner = selected + first.view(-1, 1, 1, 1, 1)
    owner = torch.where(selected < 0, total, owner).flatten()
    owner, position = torch.sort(owner, stable=True)
    bounds = torch.arange(total + 1, dtype=torch.int32, device=selected.device)
    start = torch.searchsorted(owner, bounds, out_int32=True)
    further = ((start.diff() - 1).clamp(min=0) // ENTRIES_PER_ITEM).cumsum(0, dtype=torch.int32)
    partials = torch.arange(owner.shape[0] // ENTRIES_PER_ITEM, dtype=torch.int32, device=selected.device)
    partial_owner = torch.searchsorted(further, partials, right=True, out_int32=True)
    partial_start = torch.nn.functional.pad(further, (1, 0))
    return InvertedLists((position // top_k).to(torch.int32), start, partial_start, partial_owner)
