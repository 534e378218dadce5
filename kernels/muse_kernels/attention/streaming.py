"""MuSe attention by kernels, forward and backward: the order of the steps.

Groups of heads and rows, and the workspace that they share, are in `workspace.py`. Nothing here reads device memory on
the host.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, Group, chunk_table
from muse_kernels.attention.clustering import ClusterMeans, cluster_means, cluster_orders
from muse_kernels.attention.far_field import far_field
from muse_kernels.attention.far_field_backward import far_field_backward
from muse_kernels.attention.key_clusters import gather_keys
from muse_kernels.attention.key_gradients import key_gradients
from muse_kernels.attention.layout import FarLayout, far_layout
from muse_kernels.attention.near_field import near_field, near_field_backward
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import MuseClusters
from muse_kernels.attention.scores import score_clusters
from muse_kernels.attention.selection import inverted_lists, select_clusters
from muse_kernels.attention.summaries import summaries
from muse_kernels.attention.workspace import Workspace


class Layout(NamedTuple):
    """Who sees what: from shapes, options and documents alone."""

    table: ChunkTable
    key_clusters: FarLayout
    summaries: FarLayout


def make_clusters(
    q: Tensor, k: Tensor, table: ChunkTable, options: ResolvedOptions
) -> tuple[MuseClusters, ClusterMeans]:
    """Orders and expansion points, nothing selected yet; and means of queries."""
    query_order, key_order = cluster_orders(q, k, table, options)
    means = cluster_means(q, query_order, options.query_cluster)
    mu = means.wide_mean if options.expansion == "centroid" else torch.zeros_like(means.wide_mean)
    selected = torch.full((*mu.shape[:-1], options.top_k), -1, dtype=torch.int32, device=q.device)
    return MuseClusters(query_order, key_order, mu, selected), means


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, given: MuseClusters | None, options: ResolvedOptions
) -> tuple[Tensor, Tensor, MuseClusters]:
    """out [B, H, N, D], lse float32 [B, H, N] and the clusters used.

    Args:
        q: [B, H, N, D]. k, v: [B, H_kv, N, D]. float32, float16 or bfloat16.
        given: reuse these clusters; None chooses them.
    """
    table, key_clusters, summary_layout = _layout(q, cu_seqlens, options)
    out, lse = near_field(q, k, v, cu_seqlens, table, options)
    clusters, means = (given, None) if given is not None else make_clusters(q, k, table, options)
    if options.top_k == 0:
        means = None
    candidates = None if means is None else _candidates(clusters.selected, options)
    workspace = Workspace(q, k, table.start.shape[0], options, backward=False)
    mu = means.mean if means is not None and options.expansion == "centroid" else clusters.mu.to(q.dtype)
    for group in workspace.groups():
        if group.is_first:
            clustered_k, clustered_v, spread = _keys(workspace, group, k, v, clusters, table)
        if means is not None:
            scores = workspace.scores(group)
            score_clusters(means, clustered_k, spread, scores, key_clusters, table, group, options)
            select_clusters(
                q,
                lse,
                clusters.query_order,
                clustered_k,
                scores,
                candidates,
                clusters.selected,
                key_clusters,
                table,
                group,
                options,
            )
        summary = workspace.summaries(group)
        summaries(mu, clusters.selected, clustered_k, clustered_v, summary, summary_layout, table, group, options)
        far_field(
            q,
            out,
            lse,
            clusters.query_order,
            clusters.selected,
            summary,
            clustered_k,
            clustered_v,
            summary_layout,
            table,
            group,
            options,
        )
        # Freed before the next group's are made.
        del summary
        if means is not None:
            del scores
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
    table, _, layout = _layout(q, cu_seqlens, options)
    dq, dk, dv = near_field_backward(dout, q, k, v, out, lse, cu_seqlens, table, options)
    workspace = Workspace(q, k, table.start.shape[0], options, backward=True)
    mu = clusters.mu.to(q.dtype)
    for group in workspace.groups():
        if group.is_first:
            clustered_k, clustered_v, _ = _keys(workspace, group, k, v, clusters, table)
            far = None if group.is_last else workspace.key_sums(group)
        summary = workspace.summaries(group)
        summaries(mu, clusters.selected, clustered_k, clustered_v, summary, layout, table, group, options)
        clustered, dmass_at_0 = workspace.queries(group), torch.empty_like(summary.bias)
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
            dmass_at_0,
            layout,
            table,
            group,
            options,
        )
        lists = None
        if options.top_k > 0:
            selected = _group_of(clusters.selected, workspace, group)
            lists = inverted_lists(selected, table.start.shape[0] * options.key_clusters)
        key_gradients(
            mu,
            clustered_k,
            clustered_v,
            clustered,
            summary,
            dmass_at_0,
            lists,
            far,
            dk,
            dv,
            clusters.key_order,
            layout,
            table,
            group,
            options,
        )
        del summary, clustered, dmass_at_0, lists
        if group.is_last:
            del clustered_k, clustered_v, far
    return dq, dk, dv


def _candidates(selected: Tensor, options: ResolvedOptions) -> Tensor | None:
    """A table for the first choice, where there is a second one."""
    if options.selection != "peak_mass" or options.candidates <= options.top_k:
        return None
    return selected.new_full((*selected.shape[:-1], options.candidates), -1)


def _layout(q: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions) -> Layout:
    if cu_seqlens is not None or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _new_layout(q.shape[2], cu_seqlens, options, q.device)
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
    return _layout_without_documents(q.shape[2], options, q.device, stream)


def _new_layout(num_tokens: int, cu_seqlens: Tensor | None, options: ResolvedOptions, device: torch.device) -> Layout:
    table = chunk_table(num_tokens, cu_seqlens, options, device)
    return Layout(
        table, far_layout(table, options, options.key_clusters), far_layout(table, options, options.summaries)
    )


@functools.lru_cache(maxsize=64)
def _layout_without_documents(num_tokens: int, options: ResolvedOptions, device: torch.device, stream: int) -> Layout:
    """Made once, which spares a dozen launches; for each stream, since what one makes another may read too soon."""
    return _new_layout(num_tokens, None, options, device)


def _keys(
    workspace: Workspace, group: Group, k: Tensor, v: Tensor, clusters: MuseClusters, table: ChunkTable
) -> tuple[Tensor, Tensor, Tensor]:
    clustered_k, clustered_v, spread = workspace.keys(group)
    gather_keys(
        k,
        v,
        clusters.key_order,
        table,
        group.heads,
        key_cluster=workspace.options.key_cluster,
        clustered_k=clustered_k,
        clustered_v=clustered_v,
        spread=spread,
    )
    return clustered_k, clustered_v, spread


def _group_of(selected: Tensor, workspace: Workspace, group: Group) -> Tensor:
    """[key-value heads, G, rows, query clusters, top_k] of [B, H, C, query clusters, top_k]."""
    by_kv_head = selected.view(workspace.num_kv_heads, workspace.heads_per_kv_head, *selected.shape[2:])
    return by_kv_head[group.heads, :, group.rows]
