"""Which far key clusters a query cluster attends exactly, and who attends each of them.

    R(a) = the top_k clusters with the largest score, ties to the earlier one

"centroid" scores come from stage 1. By "query_mass", with L'_q over the near field and all summaries,

    score_ab = log sum_{q in a} exp(logit_ab(q) - L'_q) + log spread_b

in two passes over the summaries of one query cluster, the second from the cache. By "peak_mass" stage 1's scores choose
candidates, which are then looked at key by key, with L'_q over the near field and the candidates' peaks:

    peak_b(q) = max_{j in b} scale q . k_j          score_ab = log sum_{q in a} exp(peak_b(q) - L'_q)

The best are found by bisecting the bits of the score, so that neither top_k nor the number of clusters is built into
the kernel. The inverted lists that the backward pass needs are a stable sort of pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.chunks import Group
from muse_kernels.attention.common import (
    LOG2E,
    listed_cluster,
    operand,
    padded_head_dim,
    query_cluster,
    rows_contiguous,
    token_rows,
)
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.summaries import Summaries, SummaryLayout, log2_of_spread
from muse_kernels.attention.tiles import tile_of


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_head", "num_heads", "num_tokens", "capacity"])
def muse_scores(
    q,
    near_lse,
    query_order,
    kbar,
    bias,
    spread,
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
):
    """One program for each query cluster: the scores of all its far key clusters."""
    a, local_head = tl.program_id(0), tl.program_id(1)
    row, head, _, token = query_cluster(
        query_order, a, local_head, first_row, first_head, num_rows, G, Q, QUERY_CLUSTERS
    )
    columns = tl.load(num_far + row)
    is_query = token >= 0
    if (columns == 0) | (tl.sum(is_query.to(tl.int32)) == 0):
        return

    d = tl.arange(0, BLOCK_D)
    q_rows = operand(token_rows(q, token, head, num_heads, q_stride_batch, q_stride_head, q_stride_token, D, BLOCK_D))
    base = local_head.to(tl.int64) * capacity + tl.load(offset + row) - tl.load(offset + first_row)
    base += (a % QUERY_CLUSTERS) * columns
    kbar, bias, scores = kbar + base * BLOCK_D, bias + base, scores + base
    spread += (local_head // G).to(tl.int64) * num_rows * KEY_CLUSTERS + tl.load(first_cluster + row)

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
        score += log2_of_spread(tl.load(spread + column, mask=is_column, other=0.0))
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
    number = (head * num_rows + first_row) * QUERY_CLUSTERS + a
    if (columns == 0) | (tl.load(query_order + number * Q) < 0):
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
        tl.store(selected + number * top_k + place, tl.load(first_cluster + row) + first + column, mask=is_selected)
        ties_left -= tl.sum(is_tie.to(tl.int32))
        num_selected += tl.sum(is_selected.to(tl.int32))


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_head", "num_heads", "num_tokens", "top_k"])
def muse_select_by_peaks(
    q,
    near_lse,
    query_order,
    clustered_k,
    candidates,
    selected,
    reference,
    num_far,
    length,
    q_stride_batch,
    q_stride_head,
    q_stride_token,
    num_rows,
    first_row,
    first_head,
    num_heads,
    num_tokens,
    top_k,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program for each query cluster: the best of its candidates, ascending; what each query's largest logit is."""
    a, local_head = tl.program_id(0), tl.program_id(1)
    row, head, number, token = query_cluster(
        query_order, a, local_head, first_row, first_head, num_rows, G, Q, QUERY_CLUSTERS
    )
    columns = tl.load(num_far + row)
    is_query = token >= 0
    if (columns == 0) | (tl.sum(is_query.to(tl.int32)) == 0):
        return

    d = tl.arange(0, BLOCK_D)
    q_rows = operand(token_rows(q, token, head, num_heads, q_stride_batch, q_stride_head, q_stride_token, D, BLOCK_D))
    candidates += number * CANDIDATES
    clustered_k += (local_head // G).to(tl.int64) * num_rows * KEY_CLUSTERS * K * BLOCK_D
    key, place = tl.arange(0, K), tl.arange(0, BLOCK)
    peaks = tl.full([Q, BLOCK], float("-inf"), tl.float32)
    for entry in range(tl.minimum(columns, CANDIDATES)):
        entries = candidates + entry
        cluster, num_keys = listed_cluster(entries, length, K, KEY_CLUSTERS, CAUSAL)
        is_cluster = num_keys > 0  # else nothing is loaded: 0 times NaN is NaN
        keys = (cluster * K + key)[:, None] * BLOCK_D + d[None, :]
        k = operand(tl.load(clustered_k + keys, mask=is_cluster, other=0.0))
        logits = tl.dot(q_rows, tl.trans(k), input_precision="ieee") * scale_log2
        peak = tl.max(tl.where((key < num_keys)[None, :], logits, float("-inf")), 1)
        peaks = tl.where((place == entry)[None, :], peak[:, None], peaks)
    # An empty place gets an infinite normaliser: no share.
    largest = tl.load(near_lse + head * num_tokens + token, mask=is_query, other=float("inf")) * LOG2E
    normaliser = tl.maximum(largest, tl.max(peaks, 1))
    near_share = tl.where(is_query, tl.exp2(largest - normaliser), 1.0)
    normaliser += tl.log2(near_share + tl.sum(tl.exp2(peaks - normaliser[:, None]), 1))
    share = tl.sum(tl.exp2(peaks - normaliser[:, None]), 0)
    choice = tl.load(candidates + place, mask=place < CANDIDATES, other=-1)
    share = tl.where((choice >= 0) & (share >= 0.0), share, -1.0)  # not those of NaN, which would all rank first
    is_better = (share[None, :] > share[:, None]) | (
        (share[None, :] == share[:, None]) & (place[None, :] < place[:, None])
    )
    is_selected = (tl.sum(is_better.to(tl.int32), 1) < top_k) & (share >= 0.0)
    target = tl.cumsum(is_selected.to(tl.int32), 0) - 1
    tl.store(selected + number * top_k + target, choice, mask=is_selected)
    retrieved = tl.max(tl.where(is_selected[None, :], peaks, float("-inf")), 1)
    tl.store(reference + head * num_tokens + token, tl.maximum(largest, retrieved), mask=is_query)


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
    number = (head * num_rows + first_row) * QUERY_CLUSTERS + a
    base = local_head.to(tl.int64) * capacity + tl.load(offset + row) - tl.load(offset + first_row)
    base += (a % QUERY_CLUSTERS) * columns
    for first in range(0, top_k, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        column = tl.load(selected + number * top_k + entry, mask=entry < top_k, other=-1) - row_first
        tl.store(bias + base + column, float("-inf"), mask=(column >= 0) & (column < columns))


class InvertedLists(NamedTuple):
    """Who retrieves each key cluster of a group: pairs of key cluster and query cluster, sorted by key cluster."""

    owner: Tensor
    """int32 [pairs]: key clusters, counted over the group's heads; their number where nothing is retrieved."""
    position: Tensor
    """int64 [pairs]: place of the pair in `selected`, that is query cluster * top_k + rank."""
    start: Tensor
    """int32 [key clusters + 1]: where each key cluster's pairs start."""


def select_clusters(
    q: Tensor,
    near_lse: Tensor,
    query_order: Tensor,
    clustered_k: Tensor,
    summary: Summaries,
    spread: Tensor,
    scores: Tensor,
    candidates: Tensor | None,
    selected: Tensor,
    reference: Tensor | None,
    layout: SummaryLayout,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Write R(a) of the query clusters of a group of rows and heads into `selected`, which is all -1 before.

    Args:
        q: [B, H, N, D]. near_lse: float32 [B, H, N], natural log. query_order: int32 [B, H, C, chunk].
        clustered_k: [heads, C * chunk, padded D].
        spread: float32 [heads, C * chunk / key_cluster].
        scores: float32, shape of `summary.bias`: those of stage 1, or a buffer for those of "query_mass".
        candidates: int32 [B, H, C, chunk / query_cluster, candidates], all -1, to be filled; None without candidates.
        selected: int32 [B, H, C, chunk / query_cluster, top_k].
        reference: with candidates, float32 [B, H, N], to be filled where there are far keys: the largest of a query's
            near lse and its logits with retrieved keys, base 2.
    """
    q = rows_contiguous(q)
    head_dim, num_rows = q.shape[-1], layout.num_far.shape[0]
    query_heads = summary.kbar.shape[0]
    group_size = query_heads // group.num_heads
    grid = (group.num_rows * options.query_clusters, query_heads)
    capacity = summary.bias.shape[1]
    scale_log2 = options.softmax_scale * LOG2E.value
    if options.selection == "query_mass":
        muse_scores[grid](
            q,
            near_lse,
            query_order,
            summary.kbar,
            summary.bias,
            spread,
            scores,
            *layout[:3],
            *q.stride()[:3],
            num_rows,
            group.rows.start,
            group.heads.start,
            q.shape[1],
            q.shape[2],
            capacity,
            scale_log2,
            G=group_size,
            D=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            Q=options.query_cluster,
            QUERY_CLUSTERS=options.query_clusters,
            KEY_CLUSTERS=options.key_clusters,
            ORDER=options.order,
            **tile_of("scores", clustered_k),
        )
    chosen = selected if candidates is None else candidates
    muse_select[grid](
        scores,
        query_order,
        chosen,
        *layout[:3],
        num_rows,
        group.rows.start,
        group.heads.start,
        capacity,
        chosen.shape[-1],
        G=group_size,
        Q=options.query_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        **tile_of("select", clustered_k),
    )
    if candidates is not None:
        muse_select_by_peaks[grid](
            q,
            near_lse,
            query_order,
            clustered_k,
            candidates,
            selected,
            reference,
            layout.num_far,
            layout.length,
            *q.stride()[:3],
            num_rows,
            group.rows.start,
            group.heads.start,
            q.shape[1],
            q.shape[2],
            options.top_k,
            scale_log2,
            G=group_size,
            D=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            Q=options.query_cluster,
            K=options.key_cluster,
            QUERY_CLUSTERS=options.query_clusters,
            KEY_CLUSTERS=options.key_clusters,
            CANDIDATES=options.candidates,
            BLOCK=max(16, 1 << (options.candidates - 1).bit_length()),
            CAUSAL=options.causal,
            **tile_of("select_by_peaks", clustered_k),
        )


def switch_off_retrieved(
    summary: Summaries, selected: Tensor, layout: SummaryLayout, group: Group, options: ResolvedOptions
) -> None:
    """Set the bias of retrieved clusters' summaries to -inf: their keys are attended instead."""
    muse_switch_off[(group.num_rows * options.query_clusters, summary.kbar.shape[0])](
        summary.bias,
        selected,
        *layout[:3],
        layout.num_far.shape[0],
        group.rows.start,
        group.heads.start,
        summary.bias.shape[1],
        options.top_k,
        G=summary.kbar.shape[0] // group.num_heads,
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
    num_heads = selected.shape[0]
    first = torch.arange(num_heads, dtype=torch.int32, device=selected.device) * num_key_clusters
    total = num_heads * num_key_clusters
    owner = torch.where(selected < 0, total, selected + first.view(-1, 1, 1, 1, 1)).flatten()
    owner, position = torch.sort(owner, stable=True)
    clusters = torch.arange(total + 1, dtype=torch.int32, device=selected.device)
    return InvertedLists(owner, position, torch.searchsorted(owner, clusters, out_int32=True))
