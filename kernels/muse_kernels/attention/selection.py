"""Which far key clusters a query cluster attends exactly, and who attends each of them.

    R(a) = the top_k clusters with the largest score, ties to the earlier one

Scores by "centroid" are those of `scores.py`. By "peak_mass" those choose candidates, which are then looked at key by
key, with L'_q over the near field and the candidates' peaks:

    peak_b(q) = max_{j in b} scale q . k_j          score_ab = log sum_{q in a} exp(peak_b(q) - L'_q)

Shares are added up as they are, so that a candidate whose share of every query is below 2^-149 counts for nothing. The
best are found by bisecting the bits of the score, so that neither top_k nor the number of clusters is built into
the kernel. The inverted lists that the backward pass needs are a stable sort of pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, Group
from muse_kernels.attention.common import (
    LOG2E,
    listed_cluster,
    operand,
    padded_head_dim,
    query_cluster,
    rows_contiguous,
    token_rows,
)
from muse_kernels.attention.layout import FarLayout, far_place
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.tiles import tile_of


@triton.jit
def _ordered_bits(scores, column, columns):
    """Integers in the order of the scores in these columns, from 1 up; 0 for -inf and NaN, which nobody selects."""
    score = tl.load(scores + column, mask=column < columns, other=float("-inf"))
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
    scores += far_place(offset, first_row, row, a % QUERY_CLUSTERS, columns, local_head, capacity)
    threshold = tl.full([], 0, tl.int64)  # ends as the top_k-th largest, or as 0 where fewer are in sight
    for step in range(16):  # two bits at a time: three counts below 2^21 in one sum
        unit = tl.full([], 1073741824, tl.int64) >> (2 * step)
        counts = tl.full([], 0, tl.int64)
        for first in range(0, columns, BLOCK):
            bits = _ordered_bits(scores, first + column, columns) - threshold
            reached = (bits >= unit).to(tl.int64) + ((bits >= 2 * unit).to(tl.int64) << 21)
            counts += tl.sum(reached + ((bits >= 3 * unit).to(tl.int64) << 42))
        passed = ((counts & 0x1FFFFF) >= top_k).to(tl.int64) + (((counts >> 21) & 0x1FFFFF) >= top_k).to(tl.int64)
        threshold += unit * (passed + ((counts >> 42) >= top_k).to(tl.int64))
    above = tl.full([], 0, tl.int32)
    for first in range(0, columns, BLOCK):
        above += tl.sum((_ordered_bits(scores, first + column, columns) > threshold).to(tl.int32))
    ties_left, num_selected = top_k - above, tl.full([], 0, tl.int32)
    for first in range(0, columns, BLOCK):
        bits = _ordered_bits(scores, first + column, columns)
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
    """One program for each query cluster: the best of its candidates, ascending."""
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
    scores: Tensor,
    candidates: Tensor | None,
    selected: Tensor,
    layout: FarLayout,
    table: ChunkTable,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Write R(a) of the query clusters of a group of rows and heads into `selected`, which is all -1 before.

    Args:
        q: [B, H, N, D]. near_lse: float32 [B, H, N], natural log. query_order: int32 [B, H, C, chunk].
        clustered_k: [heads, C * chunk, padded D].
        scores: float32 [query heads, capacity], as `score_clusters` leaves them.
        candidates: int32 [B, H, C, chunk / query_cluster, candidates], all -1, to be filled; None without candidates.
        selected: int32 [B, H, C, chunk / query_cluster, top_k].
        layout: of key clusters.
    """
    q = rows_contiguous(q)
    head_dim, num_rows, query_heads = q.shape[-1], table.start.shape[0], scores.shape[0]
    group_size = query_heads // group.num_heads
    grid = (group.num_rows * options.query_clusters, query_heads)
    chosen = selected if candidates is None else candidates
    muse_select[grid](
        scores,
        query_order,
        chosen,
        *layout,
        num_rows,
        group.rows.start,
        group.heads.start,
        scores.shape[1],
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
            layout.num_far,
            table.length,
            *q.stride()[:3],
            num_rows,
            group.rows.start,
            group.heads.start,
            q.shape[1],
            q.shape[2],
            options.top_k,
            options.softmax_scale * LOG2E.value,
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
