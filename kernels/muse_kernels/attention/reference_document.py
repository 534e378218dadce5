"""MuSe attention of one document, forward and backward, from the steps in `reference.py`.

Query chunks are worked on in groups, as many at a time as the workspace allows: summaries of one query chunk are used
by that chunk alone, so memory does not grow with the square of the length. The backward pass makes them again.
Shape letters as in `reference.py`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention import reference as step
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import FarField, Merged, MuseClusters, Summaries


class QueryGroup(NamedTuple):
    """Consecutive query chunks, with the far key clusters that any of them may see."""

    chunks: slice
    tokens: slice
    num_far: int
    """M: far key clusters in sight of the last chunk; they are the document's first."""
    q: Tensor
    """[B, T, A, S, D], scaled; zeros at empty places."""
    is_query: Tensor
    """bool [A, S]"""
    mu: Tensor
    """[B, T, A, D], scaled."""
    in_sight: Tensor
    """bool [A, M]"""


class Far(NamedTuple):
    """What the queries of a group attend to far away."""

    keys: FarField
    selected: Tensor
    """[B, T, A, R]"""
    summary: Summaries
    is_summarised: Tensor
    """bool [B, T, M', A, K']"""


class Document:
    """q, k and v of one document in cluster order.

    Args:
        q: [B, H, N, D], scaled. k, v: [B, T, N, D]. All float32 or float64.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, clusters: MuseClusters, options: ResolvedOptions) -> None:
        self.q, self.options, self.clusters = q, options, clusters
        self.num_kv_heads, self.heads_per_kv_head = k.shape[1], q.shape[1] // k.shape[1]
        self.num_tokens, self.num_chunks = q.shape[2], clusters.query_order.shape[2]
        self.k, self.v = (
            step.gather_tokens(x, clusters.key_order).flatten(2, 3).unflatten(2, (-1, options.key_cluster))
            for x in (k, v)
        )
        # Empty places come last in a chunk whatever the order of its members, so that one head tells for all.
        self.is_key = (clusters.key_order[0, 0] >= 0).view(-1, options.key_cluster)
        self.is_query = (clusters.query_order[0, 0] >= 0).unflatten(-1, (-1, options.query_cluster))

    def groups(self) -> Iterator[QueryGroup]:
        """The query chunks that have far keys, in groups whose intermediate results fit into the workspace."""
        options = self.options
        step_size = max(1, options.workspace_mib * 2**20 // self._bytes_per_chunk())
        for start in range(0, self.num_chunks, step_size):
            stop = min(start + step_size, self.num_chunks)
            num_far = (stop - 1 if options.causal else self.num_chunks) * options.key_clusters
            if num_far > 0:
                yield self._group(slice(start, stop), num_far)

    def _bytes_per_chunk(self) -> int:
        options, head_dim = self.options, self.k.shape[-1]
        num_summaries = self.num_chunks * options.summaries
        has_candidates = options.selection == "peak_mass" and 0 < options.top_k < options.candidates
        candidates = options.candidates if has_candidates else 0
        # A mask is a fourth or an eighth of a number.
        per_summary = 6 * head_dim + 4 * options.summary_cluster
        summaries = options.query_clusters * num_summaries * per_summary
        looked_at = max(3 * options.top_k, 2 * candidates)
        logits = options.chunk * (4 * num_summaries + looked_at * options.key_cluster)
        gathered = max(4 * options.top_k, candidates)
        retrieved = options.query_clusters * gathered * options.key_cluster * head_dim
        numbers = self.q.shape[0] * self.q.shape[1] * (summaries + logits + retrieved)
        return numbers * self.q.element_size()

    def _group(self, chunks: slice, num_far: int) -> QueryGroup:
        options = self.options
        tokens = slice(chunks.start * options.chunk, min(chunks.stop * options.chunk, self.num_tokens))
        is_query = self.is_query[chunks].flatten(0, 1).repeat(self.heads_per_kv_head, 1)
        mu = self.grouped(self.clusters.mu[:, :, chunks].flatten(2, 3)) * options.softmax_scale
        in_sight = self._in_sight(chunks, num_far)
        q = self.queries(self.q, chunks)
        return QueryGroup(chunks, tokens, num_far, q, is_query, mu, in_sight)

    def _in_sight(self, chunks: slice, num_far: int) -> Tensor:
        """Far keys are those of earlier chunks (bidirectional: of any other chunk): bool [A, M]."""
        key_chunk = torch.arange(num_far, device=self.k.device) // self.options.key_clusters
        query_chunk = torch.arange(chunks.start, chunks.stop, device=self.k.device)
        query_chunk = query_chunk.repeat_interleave(self.options.query_clusters).repeat(self.heads_per_kv_head)[:, None]
        is_far = key_chunk < query_chunk if self.options.causal else key_chunk != query_chunk
        return is_far & self.is_key[:num_far].any(-1)

    def grouped(self, x: Tensor) -> Tensor:
        """[B, H, A / G, ...] -> [B, T, A, ...]: the query clusters of all heads of one key-value head together."""
        return x.unflatten(1, (self.num_kv_heads, -1)).flatten(2, 3)

    def ungrouped(self, x: Tensor) -> Tensor:
        """Inverse of `grouped`."""
        return x.unflatten(2, (self.heads_per_kv_head, -1)).flatten(1, 2)

    def queries(self, x: Tensor, chunks: slice) -> Tensor:
        """Rows of x [B, H, N, D] in the clusters of these chunks: [B, T, A, S, D]; without D if x has none."""
        rows = step.gather_tokens(x if x.dim() == 4 else x.unsqueeze(-1), self.clusters.query_order[:, :, chunks])
        rows = self.grouped(rows.flatten(2, 3).unflatten(2, (-1, self.options.query_cluster)))
        return rows if x.dim() == 4 else rows.squeeze(-1)

    def tokens(self, rows: Tensor, group: QueryGroup) -> Tensor:
        """Inverse of `queries`, for the tokens of one group: [B, H, tokens of the group, D]."""
        order = self.clusters.query_order[:, :, group.chunks]
        order = torch.where(order < 0, -1, order - group.tokens.start)
        return step.scatter_tokens(self.ungrouped(rows), order, group.tokens.stop - group.tokens.start)

    def select(self, group: QueryGroup, near_lse: Tensor, spread: Tensor) -> None:
        """Choose the retrieved key clusters of the group's query clusters and write them into `clusters.selected`.

        Args:
            near_lse: [B, T, A, S]. spread: [B, T, C * key_clusters].
        """
        options, spread = self.options, spread[:, :, None, : group.num_far]
        is_choice = group.in_sight & group.is_query.any(-1, keepdim=True)
        mean = group.q.sum(3) / group.is_query.sum(-1, keepdim=True).clamp(min=1)
        mass = step.cluster_mass(mean, self.k[:, :, : group.num_far], self.is_key[: group.num_far])
        if options.selection == "centroid":
            log_spread = spread.clamp(min=torch.finfo(spread.dtype).tiny).log()
            selected = step.select(mass + log_spread, is_choice, options.top_k)
        else:
            scores = step.coarse_score(mass, group.q, spread, group.is_query)
            selected = self._by_peaks(group, near_lse, step.select(scores, is_choice, options.first_choice))
        selected = self.ungrouped(selected)
        self.clusters.selected[:, :, group.chunks] = selected.unflatten(2, (-1, self.options.query_clusters))

    def _by_peaks(self, group: QueryGroup, near_lse: Tensor, candidates: Tensor) -> Tensor:
        """The top_k of the candidates [B, T, A, candidates] by the mass of their largest keys."""
        top_k = self.options.top_k
        if candidates.shape[-1] <= top_k:
            return candidates
        k, is_key = self.k[:, :, : group.num_far], self.is_key[: group.num_far]
        peaks = step.cluster_peaks(group.q, k, is_key, candidates)
        scores = step.peak_mass(peaks, near_lse, group.is_query)
        place = step.select(scores, candidates >= 0, top_k)
        return candidates.gather(-1, place.long().clamp(min=0)).masked_fill(place < 0, -1)

    def far(self, group: QueryGroup) -> Far:
        """What the group's queries attend to far away."""
        selected = self.grouped(self.clusters.selected[:, :, group.chunks].flatten(2, 3))
        k, v, is_key = self.k[:, :, : group.num_far], self.v[:, :, : group.num_far], self.is_key[: group.num_far]
        is_retrieved = step.retrieved_clusters(selected, group.num_far).transpose(2, 3).unsqueeze(-1)
        is_summarised = self.runs((is_key[:, None] & ~is_retrieved).transpose(3, 4)).transpose(3, 4)
        summary = step.summaries(group.mu, self.runs(k), self.runs(v), is_summarised)
        in_sight = group.in_sight.unflatten(1, (-1, self.options.key_clusters_per_summary)).any(-1)
        logits = step.summary_logits(group.q, group.mu, summary, in_sight, self.options.order)
        return Far(step.far_keys(group.q, k, v, is_key, logits, selected), selected, summary, is_summarised)

    def runs(self, x: Tensor) -> Tensor:
        """Key clusters [B, T, M, K, ...] in the runs that have a summary: [B, T, M', K', ...]."""
        return x.unflatten(2, (-1, self.options.key_clusters_per_summary)).flatten(3, 4)


def make_clusters(q: Tensor, k: Tensor, options: ResolvedOptions, mu_dtype: torch.dtype) -> MuseClusters:
    """Orders and expansion points of one document; `selected` is all -1 until the forward pass fills it.

    Args:
        q: [B, H, N, D], not scaled. k: [B, T, N, D]. mu_dtype: what the values of mu are rounded to.
    """
    query_order = step.cluster_order(q, options.chunk, options.query_cluster, options.query_clustering)
    key_order = step.cluster_order(k, options.chunk, options.key_cluster, options.key_clustering)
    mu = step.cluster_means(q, query_order, options.query_cluster).to(mu_dtype).to(q.dtype)
    if options.expansion == "zero":
        mu = torch.zeros_like(mu)
    selected = query_order.new_full((*mu.shape[:-1], options.top_k), -1)
    return MuseClusters(query_order, key_order, mu, selected)


def document_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: ResolvedOptions,
    clusters: MuseClusters | None = None,
    mu_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, MuseClusters]:
    """MuSe attention of one document.

    Args:
        q: [B, H, N, D], not scaled. k, v: [B, T, N, D]. float32 or float64.
        clusters: reuse these; None chooses them.
        mu_dtype: what the values of a chosen mu are rounded to, the dtype that q had; None is q's.
    Returns:
        out [B, H, N, D]; lse [B, H, N]; the clusters used.
    """
    is_given = clusters is not None
    clusters = clusters if clusters is not None else make_clusters(q, k, options, mu_dtype or q.dtype)
    document = Document(q * options.softmax_scale, k, v, clusters, options)
    out, lse = step.near_field(document.q, k, v, options)
    spread = step.key_spread(document.k, document.is_key)
    for group in document.groups():
        near_out, near_lse = document.queries(out, group.chunks), document.queries(lse, group.chunks)
        if not is_given and options.top_k > 0:
            document.select(group, near_lse, spread)
        far = document.far(group)
        merged_out, merged_lse = step.merge_by_lse(near_out, near_lse, *step.far_field(far.keys, far.summary.vbar))
        out[:, :, group.tokens] = document.tokens(merged_out, group)
        lse[:, :, group.tokens] = document.tokens(merged_lse.unsqueeze(-1), group).squeeze(-1)
    return out, lse, clusters


def document_backward(
    q: Tensor, k: Tensor, v: Tensor, merged: Merged, clusters: MuseClusters, options: ResolvedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `document_forward`, with its clusters; cluster orders, mu and R are constants.

    Source: docs/attention.md, "Gradient".
    """
    document = Document(q * options.softmax_scale, k, v, clusters, options)
    dq, dk, dv = step.near_field_backward(document.q, k, v, merged, options)
    far_dk, far_dv = torch.zeros_like(document.k), torch.zeros_like(document.v)
    for group in document.groups():
        far, seen = document.far(group), slice(group.num_far)
        rows = (document.queries(x, group.chunks) for x in (merged.dout, merged.lse, merged.delta))
        group_dout, group_lse, group_delta = rows
        group_lse = group_lse.masked_fill(~group.is_query, math.inf)  # no weight where there is no query
        group_dq, gradient = step.far_field_backward(
            group_dout, group.q, group.mu, far.keys, far.summary, group_lse, group_delta, options.order
        )
        group_dq = group_dq + step.retrieved_backward(
            group_dout, group.q, far.keys, far.selected, group_lse, group_delta, far_dk[:, :, seen], far_dv[:, :, seen]
        )
        k, v = (document.runs(x[:, :, seen]) for x in (document.k, document.v))
        through_summaries = step.summaries_backward(group.mu, k, v, far.is_summarised, far.summary, gradient)
        for total, part in zip((far_dk, far_dv), through_summaries, strict=True):
            total[:, :, seen] += part.flatten(2, 3).unflatten(2, (-1, options.key_cluster))
        dq[:, :, group.tokens] += document.tokens(group_dq, group)
    dk += step.scatter_tokens(far_dk.flatten(2, 3), clusters.key_order.flatten(2), document.num_tokens)
    dv += step.scatter_tokens(far_dv.flatten(2, 3), clusters.key_order.flatten(2), document.num_tokens)
    return dq * options.softmax_scale, dk, dv
