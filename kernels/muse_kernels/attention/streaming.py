"""MuSe attention by kernels, forward and backward: the order of the steps, and a workspace that does not grow with N^2.

Heads are worked on in groups, as many as the workspace holds; where it cannot hold one key-value head with all its
query heads, rows of the chunk table are taken in groups too, since the summaries of a row are used by that row alone.
Nothing here reads device memory on the host: sizes follow from shapes and options.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, chunk_table
from muse_kernels.attention.clustering import cluster_means, cluster_order
from muse_kernels.attention.common import padded_head_dim
from muse_kernels.attention.far_field import far_field, far_field_backward
from muse_kernels.attention.key_clusters import gather_keys
from muse_kernels.attention.key_gradients import LONGEST_PIECE, ClusteredQueries, key_gradients
from muse_kernels.attention.near_field import near_field, near_field_backward
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import MuseClusters
from muse_kernels.attention.selection import inverted_lists, select_clusters, switch_off_retrieved
from muse_kernels.attention.summaries import (
    FirstChoice,
    Summaries,
    SummaryLayout,
    summaries,
    summaries_per_row,
    summary_layout,
)


class Group(NamedTuple):
    """Work that fits into the workspace."""

    heads: slice
    """Key-value heads, counted over batch and heads together."""
    rows: slice
    """Rows of the chunk table."""
    capacity: int
    """Summaries per query head that the rows may need."""
    is_first: bool
    """The first rows of these heads."""
    is_last: bool


class Workspace:
    """Sizes and buffers of one forward or backward pass.

    Args:
        q: [B, H, N, D]. k: [B, H_kv, N, D].
        row_count: rows of the chunk table.
    """

    def __init__(self, q: Tensor, k: Tensor, row_count: int, options: ResolvedOptions, *, backward: bool) -> None:
        self.options, self.row_count, self.backward = options, row_count, backward
        self.dtype, self.device = q.dtype, q.device
        self.num_kv_heads, self.heads_per_kv_head = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
        self.head_dim = padded_head_dim(q.shape[-1])
        self.capacities = [summaries_per_row(row, q.shape[2], options) for row in range(row_count)]

    def groups(self) -> Iterator[Group]:
        """Groups in the order in which gradients of keys can be added up; none where no row has far keys."""
        if sum(self.capacities) == 0:
            return
        budget = self.options.workspace_mib * 2**20
        keys = 2 * self.row_count * self.options.chunk * self.head_dim  # numbers: k and v of one head
        per_head = keys * self.dtype.itemsize
        row_bytes = [self._bytes_per_row(capacity) for capacity in self.capacities]
        parts = -(-self.num_kv_heads * (per_head + sum(row_bytes)) // budget)
        if parts <= self.num_kv_heads:
            heads_at_once = -(-self.num_kv_heads // parts)
            row_groups = [slice(0, self.row_count)]
        else:
            heads_at_once = 1
            if self.backward:
                per_head += keys * 4  # sums of their gradients, float32
            row_groups = list(_split(row_bytes, max(budget - per_head, budget // 2)))
        for start in range(0, self.num_kv_heads, heads_at_once):
            heads = slice(start, min(start + heads_at_once, self.num_kv_heads))
            for rows in row_groups:
                capacity = sum(self.capacities[rows])
                yield Group(heads, rows, capacity, rows.start == 0, rows.stop == self.row_count)

    def _bytes_per_row(self, capacity: int) -> int:
        """What a row adds: its summaries with bias and score (or dA), and in the backward pass its queries."""
        options = self.options
        per_query_head = capacity * (2 * self.head_dim * self.dtype.itemsize + 8)
        if self.backward:
            per_query_head += options.chunk * (2 * self.head_dim * self.dtype.itemsize + 8)
            # For each pair of a query cluster and a key cluster that it retrieves: sorting, partial results.
            per_pair = 40 + 8 * options.key_cluster * self.head_dim // LONGEST_PIECE
            per_query_head += options.query_clusters * options.top_k * per_pair
        return per_query_head * self.heads_per_kv_head

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised buffer."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def summaries(self, group: Group) -> Summaries:
        """Buffers for the summaries of a group."""
        heads = (group.heads.stop - group.heads.start) * self.heads_per_kv_head
        return Summaries(
            self.empty(heads, group.capacity, self.head_dim),
            self.empty(heads, group.capacity, self.head_dim),
            self.empty(heads, group.capacity, dtype=torch.float32),
        )

    def scores(self, group: Group) -> Tensor:
        """A buffer for the scores of a group's far clusters."""
        heads = (group.heads.stop - group.heads.start) * self.heads_per_kv_head
        return self.empty(heads, group.capacity, dtype=torch.float32)

    def keys(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers for keys and values in cluster order and the clusters' spread."""
        heads = group.heads.stop - group.heads.start
        shape = (heads, self.row_count * self.options.chunk, self.head_dim)
        spread = self.empty(heads, self.row_count * self.options.key_clusters, dtype=torch.float32)
        return self.empty(*shape), self.empty(*shape), spread

    def queries(self, group: Group) -> ClusteredQueries:
        """Buffers in query-cluster order for q, dout, lse and delta of a group."""
        heads = (group.heads.stop - group.heads.start) * self.heads_per_kv_head
        places = (group.rows.stop - group.rows.start) * self.options.chunk
        return ClusteredQueries(
            self.empty(heads, places, self.head_dim),
            self.empty(heads, places, self.head_dim),
            self.empty(heads, places, dtype=torch.float32),
            self.empty(heads, places, dtype=torch.float32),
        )

    def key_sums(self, group: Group) -> tuple[Tensor, Tensor]:
        """Buffers for the sums of dk and dv over groups of rows."""
        shape = (group.heads.stop - group.heads.start, self.row_count * self.options.chunk, self.head_dim)
        return self.empty(*shape, dtype=torch.float32), self.empty(*shape, dtype=torch.float32)


def _split(sizes: list[int], budget: int) -> Iterator[slice]:
    """Consecutive ranges whose sizes add up to at most `budget`, or of one item."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > budget:
            yield slice(start, index)
            start, total = index, 0
        total += size
    yield slice(start, len(sizes))


def make_clusters(
    q: Tensor, k: Tensor, row_count: int, table: ChunkTable, options: ResolvedOptions
) -> tuple[MuseClusters, tuple[Tensor, Tensor]]:
    """Orders and expansion points, nothing selected yet; and each query cluster's mean and mean square."""
    query_order = cluster_order(q, table, options.chunk, options.query_cluster, options.query_clustering)
    key_order = cluster_order(k, table, options.chunk, options.key_cluster, options.key_clustering)
    mean, mean_square = cluster_means(q, query_order, options.query_cluster)
    mu = mean if options.expansion == "centroid" else torch.zeros_like(mean)
    selected = torch.full((*mu.shape[:-1], options.top_k), -1, dtype=torch.int32, device=q.device)
    return MuseClusters(query_order, key_order, mu, selected), (mean.to(q.dtype), mean_square)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, given: MuseClusters | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor, MuseClusters]:
    """out [B, H, N, D], lse float32 [B, H, N] and the clusters used.

    Args:
        q: [B, H, N, D]. k, v: [B, H_kv, N, D]. float32, float16 or bfloat16.
        given: reuse these clusters; None chooses them.
    """
    table, layout = _layout(q, cu_seqlens, options)
    row_count = table.start.shape[0]
    out, lse = near_field(q, k, v, cu_seqlens, table, options)
    clusters, means = (given, None) if given is not None else make_clusters(q, k, row_count, table, options)
    if options.top_k == 0:
        means = None
    candidates = None if means is None else _candidates(clusters.selected, options)
    workspace = Workspace(q, k, row_count, options, backward=False)
    mu = clusters.mu.to(q.dtype)
    for group in workspace.groups():
        rows, heads = group.rows, group.heads
        if group.is_first:
            clustered_k, clustered_v, spread = _keys(workspace, group, k, v, clusters)
        scores, first_choice = workspace.scores(group), None
        if means is not None and options.selection != "query_mass":
            first_choice = FirstChoice(*means, spread, scores)
        summary = _summaries(workspace, group, mu, clustered_k, clustered_v, layout, first_choice)
        if means is not None:
            select_clusters(
                q,
                lse,
                clusters.query_order,
                clustered_k,
                summary,
                spread,
                scores,
                candidates,
                clusters.selected,
                layout,
                rows,
                heads,
                options,
            )
        switch_off_retrieved(summary, clusters.selected, layout, rows, heads, options)
        far_field(
            q,
            out,
            lse,
            clusters.query_order,
            clusters.selected,
            summary,
            clustered_k,
            clustered_v,
            layout,
            rows,
            heads,
            options,
        )
        # Freed before the next group's are made.
        del summary, scores, first_choice
        if group.is_last:
            del clustered_k, clustered_v, spread
    return out, lse, clusters


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    clusters: MuseClusters,
    options: ResolvedOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attention_forward` with its clusters, contiguous, in the dtype of q."""
    table, layout = _layout(q, cu_seqlens, options)
    row_count = table.start.shape[0]
    dq, dk, dv = near_field_backward(dout, q, k, v, out, lse, cu_seqlens, table, options)
    workspace = Workspace(q, k, row_count, options, backward=True)
    mu = clusters.mu.to(q.dtype)
    for group in workspace.groups():
        rows, heads = group.rows, group.heads
        if group.is_first:
            clustered_k, clustered_v, _ = _keys(workspace, group, k, v, clusters)
            far = None if group.is_last else workspace.key_sums(group)
        summary = _summaries(workspace, group, mu, clustered_k, clustered_v, layout)
        switch_off_retrieved(summary, clusters.selected, layout, rows, heads, options)
        clustered, dmass = workspace.queries(group), torch.empty_like(summary.bias)
        far_field_backward(
            dout,
            q,
            out,
            lse,
            dq,
            clusters.query_order,
            clusters.selected,
            mu,
            summary,
            clustered_k,
            clustered_v,
            clustered,
            dmass,
            layout,
            rows,
            heads,
            options,
        )
        lists = None
        if options.top_k > 0:
            selected = _group_of(clusters.selected, workspace, group)
            lists = inverted_lists(selected, row_count * options.key_clusters)
        key_gradients(
            mu,
            clustered_k,
            clustered_v,
            clustered,
            Summaries(summary.kbar, summary.vbar, dmass),
            lists,
            far,
            dk,
            dv,
            clusters.key_order,
            layout,
            rows,
            heads,
            options,
            is_first=group.is_first,
            is_last=group.is_last,
        )
        del summary, clustered, dmass, lists
        if group.is_last:
            del clustered_k, clustered_v, far
    return dq, dk, dv


def _candidates(selected: Tensor, options: ResolvedOptions) -> Tensor | None:
    """A table for the first choice, where there is a second one."""
    if options.selection != "peak_mass" or options.candidates <= options.top_k:
        return None
    return selected.new_full((*selected.shape[:-1], options.candidates), -1)


def _layout(q: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions) -> tuple[ChunkTable, SummaryLayout]:
    if cu_seqlens is None and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _layout_without_documents(q.shape[2], options, q.device)
    table = chunk_table(q.shape[2], cu_seqlens, options, q.device)
    return table, summary_layout(table, options)


@functools.lru_cache(maxsize=64)
def _layout_without_documents(
    num_tokens: int, options: ResolvedOptions, device: torch.device
) -> tuple[ChunkTable, SummaryLayout]:
    """Made on the host and copied, once: what takes a dozen small launches otherwise."""
    table = chunk_table(num_tokens, None, options, torch.device("cpu"))
    layout = summary_layout(table, options)
    return ChunkTable(*(x.to(device) for x in table)), SummaryLayout(*(x.to(device) for x in layout))


def _keys(
    workspace: Workspace, group: Group, k: Tensor, v: Tensor, clusters: MuseClusters
) -> tuple[Tensor, Tensor, Tensor]:
    clustered_k, clustered_v, spread = workspace.keys(group)
    gather_keys(
        k,
        v,
        clusters.key_order,
        group.heads,
        key_cluster=workspace.options.key_cluster,
        clustered_k=clustered_k,
        clustered_v=clustered_v,
        spread=spread,
    )
    return clustered_k, clustered_v, spread


def _summaries(
    workspace: Workspace,
    group: Group,
    mu: Tensor,
    clustered_k: Tensor,
    clustered_v: Tensor,
    layout: SummaryLayout,
    first_choice: FirstChoice | None = None,
) -> Summaries:
    summary = workspace.summaries(group)
    summaries(mu, clustered_k, clustered_v, summary, layout, group.rows, group.heads, workspace.options, first_choice)
    return summary


def _group_of(selected: Tensor, workspace: Workspace, group: Group) -> Tensor:
    """[key-value heads, G, rows, query clusters, top_k] of [B, H, C, query clusters, top_k]."""
    by_kv_head = selected.view(workspace.num_kv_heads, workspace.heads_per_kv_head, *selected.shape[2:])
    return by_kv_head[group.heads, :, group.rows]
