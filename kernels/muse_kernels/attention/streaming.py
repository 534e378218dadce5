"""MuSe attention by kernels, forward and backward: the order of the steps.

Groups of heads and rows, and the workspace that they share, are in `workspace.py`. Nothing here reads device memory on
the host.
"""

import functools

import torch
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, Group, chunk_table
from muse_kernels.attention.clustering import cluster_means, cluster_order
from muse_kernels.attention.far_field import far_field, far_field_backward
from muse_kernels.attention.key_clusters import gather_keys
from muse_kernels.attention.key_gradients import key_gradients
from muse_kernels.attention.near_field import near_field, near_field_backward
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import MuseClusters
from muse_kernels.attention.selection import inverted_lists, select_clusters, switch_off_retrieved
from muse_kernels.attention.summaries import (
    FirstChoice,
    Summaries,
    SummaryLayout,
    summaries,
    summary_layout,
)
from muse_kernels.attention.workspace import Workspace


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
    reference = None if candidates is None else torch.empty_like(lse)
    workspace = Workspace(q, k, row_count, options, backward=False)
    mu = clusters.mu.to(q.dtype)
    for group in workspace.groups():
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
                reference,
                layout,
                group,
                options,
            )
        switch_off_retrieved(summary, clusters.selected, layout, group, options)
        far_field(
            q,
            out,
            lse,
            clusters.query_order,
            clusters.selected,
            reference,
            summary,
            clustered_k,
            clustered_v,
            layout,
            group,
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
        if group.is_first:
            clustered_k, clustered_v, _ = _keys(workspace, group, k, v, clusters)
            far = None if group.is_last else workspace.key_sums(group)
        summary = _summaries(workspace, group, mu, clustered_k, clustered_v, layout)
        switch_off_retrieved(summary, clusters.selected, layout, group, options)
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
            group,
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
            group,
            options,
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
    if cu_seqlens is not None or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _new_layout(q.shape[2], cu_seqlens, options, q.device)
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
    return _layout_without_documents(q.shape[2], options, q.device, stream)


def _new_layout(
    num_tokens: int, cu_seqlens: Tensor | None, options: ResolvedOptions, device: torch.device
) -> tuple[ChunkTable, SummaryLayout]:
    table = chunk_table(num_tokens, cu_seqlens, options, device)
    return table, summary_layout(table, options)


@functools.lru_cache(maxsize=64)
def _layout_without_documents(
    num_tokens: int, options: ResolvedOptions, device: torch.device, stream: int
) -> tuple[ChunkTable, SummaryLayout]:
    """Made once, which spares a dozen launches; for each stream, since what one makes another may read too soon."""
    return _new_layout(num_tokens, None, options, device)


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
    summaries(mu, clustered_k, clustered_v, summary, layout, group, workspace.options, first_choice)
    return summary


def _group_of(selected: Tensor, workspace: Workspace, group: Group) -> Tensor:
    """[key-value heads, G, rows, query clusters, top_k] of [B, H, C, query clusters, top_k]."""
    by_kv_head = selected.view(workspace.num_kv_heads, workspace.heads_per_kv_head, *selected.shape[2:])
    return by_kv_head[group.heads, :, group.rows]
