"""Every step of MuSe attention in plain PyTorch, as docs/attention.md defines it: what kernels are tested against.

`reference_document.py` puts the steps together. Everything is computed in float32 (float64 for float64 inputs);
`softmax_scale` is folded into q and mu before these functions see them.

Shape letters: B batch, H query heads, T key-value heads, G = H / T query heads of one key-value head, N tokens,
C chunks, D head size; A query clusters of the chunks at hand times G, S their queries each (`query_cluster`);
M key clusters in sight, K keys each (`key_cluster`); M' runs of key clusters, K' keys each (`summary_cluster`);
R retrieved clusters (`top_k`).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention.options import Clustering, ResolvedOptions

POWER_ITERATIONS = 4
"""Of a bisection, after its start vector, the covariance times the mean."""


class MuseClusters(NamedTuple):
    """Everything MuSe attention decides before it attends: held fixed, the output is a smooth function of q, k and v.

    Documents that are exact have no clusters. Of the C rows, every other document takes ceil(length / chunk) in order;
    rows left over come last. C depends on sizes alone: without documents it is ceil(N / chunk), or 0 if N is at most
    `exact_below`; with `cu_seqlens` of S documents N // chunk + min(S, N // (exact_below + 1)).
    """

    query_order: Tensor
    """int32 [B, H, C, chunk]: token index of each member, cluster after cluster, ascending inside a cluster; -1 is an
    empty place, after the members."""
    key_order: Tensor
    """int32 [B, H_kv, C, chunk]: the same for keys."""
    mu: Tensor
    """float32 (float64) [B, H, C, chunk / query_cluster, D]: expansion points, of q before scaling, rounded to q's
    dtype: matrix units then multiply the very point around which logits are expanded."""
    selected: Tensor
    """int32 [B, H, C, chunk / query_cluster, top_k]: retrieved key clusters, ascending, then -1. A key cluster's number
    is its chunk's times (chunk / key_cluster) plus its leaf."""


class Summaries(NamedTuple):
    """A run of key clusters as one query cluster sees it (docs/attention.md, "Definition")."""

    log_mass: Tensor
    """[B, T, A, M']: A_aB, natural log."""
    kbar: Tensor
    """[B, T, A, M', D]"""
    vbar: Tensor
    """[B, T, A, M', D]"""


class Merged(NamedTuple):
    """What the backward pass of a part needs to know of the whole: the merged output, its lse and its gradient."""

    out: Tensor
    """[B, H, N, D]"""
    lse: Tensor
    """[B, H, N], natural log."""
    dout: Tensor
    """[B, H, N, D]"""

    def tokens(self, part: slice) -> "Merged":
        """The same for some of the tokens."""
        return Merged(self.out[:, :, part], self.lse[:, :, part], self.dout[:, :, part])

    @property
    def delta(self) -> Tensor:
        """dout . out, [B, H, N]."""
        return (self.dout * self.out).sum(-1)


# ---------------------------------------------------------------------------------------------- moving tokens


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x [B, H, N, D] in the order [B, H, ...] of token indices; zeros where the index is -1."""
    index = order.clamp(min=0).long().flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    rows = x.gather(2, index).view(*order.shape, x.shape[-1])
    return rows.masked_fill_((order < 0).unsqueeze(-1), 0)


def scatter_tokens(rows: Tensor, order: Tensor, num_tokens: int) -> Tensor:
    """Inverse of `gather_tokens`: rows [B, H, ..., D] back to [B, H, N, D]; places with index -1 are dropped."""
    batch, heads, head_dim = rows.shape[0], rows.shape[1], rows.shape[-1]
    index = torch.where(order < 0, num_tokens, order).long().flatten(2).unsqueeze(-1).expand(-1, -1, -1, head_dim)
    x = rows.new_zeros(batch, heads, num_tokens + 1, head_dim).scatter_(2, index, rows.flatten(2, -2))
    return x[:, :, :num_tokens]


# -------------------------------------------------------------------------------------------------- clustering


def spatial_order(x: Tensor, chunk: int) -> Tensor:
    """Contiguous runs as clusters: int32 [B, H, C, chunk] for x [B, H, N, D], -1 after the last token."""
    batch, heads, num_tokens, _ = x.shape
    num_chunks = -(-num_tokens // chunk)
    order = torch.arange(num_chunks * chunk, dtype=torch.int32, device=x.device)
    order = order.masked_fill(order >= num_tokens, -1).view(num_chunks, chunk)
    return order.expand(batch, heads, -1, -1).contiguous()


def normalised(direction: Tensor) -> Tensor:
    """Vectors [..., D, 1] at length 1; 0 stays 0."""
    return direction / direction.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(direction.dtype).tiny)


def main_direction(covariance: Tensor, mean: Tensor, away: Tensor | None = None) -> Tensor:
    """Direction of largest variance at right angles to `away`, by power iteration.

    Args:
        covariance: [..., D, D], times any factor. mean: [..., D, 1], times any factor. away: [..., D, 1], length 1.
    Returns:
        [..., D, 1] of length 1 or 0.
    """

    def without(direction: Tensor) -> Tensor:
        return direction if away is None else direction - away * (away * direction).sum(-2, keepdim=True)

    direction = without(covariance @ without(mean))
    # A mean that varies nowhere leads nowhere; the column of the coordinate with the most variance left always does.
    variance = covariance.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    if away is not None:
        variance = variance - away.square() * (away * (covariance @ away)).sum(-2, keepdim=True)
    widest = variance.argmax(-2, keepdim=True)
    is_zero = (direction == 0).all(-2, keepdim=True)
    direction = torch.where(is_zero, without(covariance.take_along_dim(widest, dim=-1)), direction)
    for _ in range(POWER_ITERATIONS):
        direction = without(covariance @ normalised(direction))
    return normalised(direction)


def main_projections(members: Tensor, is_member: Tensor) -> tuple[Tensor, Tensor]:
    """Project each node's members on its two main directions.

    Args:
        members: [..., size, D]. is_member: bool, broadcastable to [..., size]; the others have no influence.
    Returns:
        [..., size] each; +inf at places without a member, so that they sort last.
    """
    tiny = torch.finfo(members.dtype).tiny
    weight = is_member.to(members.dtype).unsqueeze(-1)
    mean = (members * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp(min=1)
    centred = (members - mean) * weight
    # One common factor per node changes no direction and keeps the squares of very large vectors finite.
    centred = centred / centred.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    covariance = centred.mT @ centred  # [..., D, D], times the number of members
    mean = (mean / mean.abs().amax(-1, keepdim=True).clamp(min=tiny)).mT
    first = main_direction(covariance, mean)
    second = main_direction(covariance, mean, first)
    first, second = (
        (centred @ direction).squeeze(-1).nan_to_num().masked_fill(~is_member, math.inf)
        for direction in (first, second)
    )
    return first, second


def variance_of_members(projection: Tensor) -> Tensor:
    """Sum of squared distances from the mean, of what is finite: [...] of [..., size]."""
    is_member = projection.isfinite()
    members = projection.masked_fill(~is_member, 0)
    mean = members.sum(-1, keepdim=True) / is_member.sum(-1, keepdim=True).clamp(min=1)
    return ((members - mean) * is_member).square().sum(-1)


def bisection_order(x: Tensor, chunk: int, cluster: int) -> Tensor:
    """Balanced clusters by recursive bisection: split at the median along the main direction until `cluster` remain.

    Args:
        x: [B, H, N, D], float32 or float64.
    Returns:
        int32 [B, H, C, chunk] as in MuseClusters. A partial last chunk fills its clusters from the first on.
    Source: docs/attention.md, "Clustering".
    """
    return bisected(x, spatial_order(x, chunk), cluster)


def bisected(x: Tensor, order: Tensor, cluster: int) -> Tensor:
    """Members of each chunk, in `order` [B, H, C, chunk], put into clusters.

    A node of four clusters or more is split twice: either half of it by that of the node's two projections that varies
    more in it. A split is a stable partition: of equal projections the earlier member goes first, and either half keeps
    the order of its members.
    """
    size = chunk = order.shape[-1]
    while size > cluster:
        nodes = order.unflatten(-1, (chunk // size, size))
        first, second = main_projections(gather_tokens(x, nodes), nodes >= 0)
        halves = _halves(first)
        nodes = nodes.take_along_dim(halves, dim=-1)
        size //= 2
        if size > cluster:
            first, second = (x.take_along_dim(halves, dim=-1).unflatten(-1, (2, size)) for x in (first, second))
            is_first = variance_of_members(first) > variance_of_members(second)
            halves = _halves(torch.where(is_first.unsqueeze(-1), first, second))
            nodes = nodes.unflatten(-1, (2, size)).take_along_dim(halves, dim=-1)
            size //= 2
        order = nodes.flatten(3)
    return order


def _halves(projection: Tensor) -> Tensor:
    """Where the members of the first half, then of the second half are: [..., size], either ascending."""
    size = projection.shape[-1]
    return projection.argsort(dim=-1, stable=True).unflatten(-1, (2, size // 2)).sort(dim=-1).values.flatten(-2)


def cluster_order(x: Tensor, chunk: int, cluster: int, clustering: Clustering) -> Tensor:
    """Token order that makes clusters of x [B, H, N, D]: int32 [B, H, C, chunk]."""
    return bisection_order(x, chunk, cluster) if clustering == "semantic" else spatial_order(x, chunk)


def cluster_means(x: Tensor, order: Tensor, cluster: int) -> Tensor:
    """Mean of each cluster's members: [B, H, C, chunk / cluster, D]; 0 for an empty cluster."""
    members = gather_tokens(x, order).unflatten(-2, (-1, cluster))
    count = (order >= 0).unflatten(-1, (-1, cluster)).sum(-1, keepdim=True)
    return members.sum(-2) / count.clamp(min=1)


# ----------------------------------------------------------------------------------- exact attention, near field


def exact_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, workspace_mib: int) -> tuple[Tensor, Tensor]:
    """Softmax attention in blocks of query rows.

    Args:
        q: [B, H, N, D], scaled. k, v: [B, T, N, D].
    Returns:
        out [B, H, N, D]; lse [B, H, N], natural log.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for rows, grouped_q, mask in _query_blocks(q, k, causal, workspace_mib):
        logits = grouped_q @ k[:, :, None, : mask.shape[1]].mT
        logits.masked_fill_(mask, -math.inf)
        block_lse = logits.logsumexp(-1)
        block_out = (logits - block_lse.unsqueeze(-1)).exp_() @ v[:, :, None, : mask.shape[1]]
        out[:, :, rows], lse[:, :, rows] = block_out.flatten(1, 2), block_lse.flatten(1, 2)
    return out, lse


def exact_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, merged: Merged, causal: bool, workspace_mib: int
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention's backward: P = exp(logit - lse), dlogit = P (dout . v - delta).

    `merged` may cover more keys than k: the gradients are then those of the whole softmax through these keys.
    Returns dq (of the scaled q), dk, dv.
    """
    heads = (k.shape[1], -1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, grouped_q, mask in _query_blocks(q, k, causal, workspace_mib):
        seen = slice(mask.shape[1])
        block = merged.tokens(rows)
        block_dout, block_lse, delta = (x.unflatten(1, heads) for x in (block.dout, block.lse, block.delta))
        logits = (grouped_q @ k[:, :, None, seen].mT).masked_fill_(mask, -math.inf)
        weights = (logits - block_lse.unsqueeze(-1)).exp_()
        dlogits = weights * (block_dout @ v[:, :, None, seen].mT - delta.unsqueeze(-1))
        dq[:, :, rows] = (dlogits @ k[:, :, None, seen]).flatten(1, 2)
        dk[:, :, seen] += (dlogits.mT @ grouped_q).sum(2)
        dv[:, :, seen] += (weights.mT @ block_dout).sum(2)
    return dq, dk, dv


def _query_blocks(q: Tensor, k: Tensor, causal: bool, workspace_mib: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of query rows: (rows, q [B, T, G, rows, D], mask [rows, keys] of the keys they must not see)."""
    batch, num_heads, num_tokens, _ = q.shape
    live_tensors = 4
    bytes_per_row = live_tensors * batch * num_heads * num_tokens * q.element_size()
    rows_per_block = max(1, min(num_tokens, workspace_mib * 2**20 // max(1, bytes_per_row)))
    for start in range(0, num_tokens, rows_per_block):
        stop = min(start + rows_per_block, num_tokens)
        keys = torch.arange(stop if causal else num_tokens, device=q.device)
        rows = torch.arange(start, stop, device=q.device)
        mask = keys > rows[:, None] if causal else torch.zeros_like(keys > rows[:, None])
        yield slice(start, stop), q[:, :, start:stop].unflatten(1, (k.shape[1], -1)), mask


def near_field(q: Tensor, k: Tensor, v: Tensor, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    """Exact attention of every token to its own chunk: out [B, H, N, D], lse [B, H, N]."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for own in _chunk_slices(q, options):
        out[:, :, own], lse[:, :, own] = exact_attention(
            q[:, :, own], k[:, :, own], v[:, :, own], options.causal, options.workspace_mib
        )
    return out, lse


def near_field_backward(
    q: Tensor, k: Tensor, v: Tensor, merged: Merged, options: ResolvedOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the own chunk's keys: dq (of the scaled q), dk, dv."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for own in _chunk_slices(q, options):
        dq[:, :, own], dk[:, :, own], dv[:, :, own] = exact_attention_backward(
            q[:, :, own], k[:, :, own], v[:, :, own], merged.tokens(own), options.causal, options.workspace_mib
        )
    return dq, dk, dv


def _chunk_slices(q: Tensor, options: ResolvedOptions) -> Iterator[slice]:
    for start in range(0, q.shape[2], options.chunk):
        yield slice(start, start + options.chunk)


# --------------------------------------------------------------------------------------------- stage 1: summaries


def summaries(mu: Tensor, k: Tensor, v: Tensor, is_summarised: Tensor) -> Summaries:
    """First-order expansion of the log-mass of every run of key clusters around every query cluster's mu.

    Args:
        mu: [B, T, A, D], scaled. k, v: [B, T, M', K', D].
        is_summarised: bool [B, T, M', A, K'] or broadcastable, False at empty places and for retrieved keys.
    Returns:
        Summaries; one without keys has log_mass -inf, kbar and vbar 0.
    """
    log_mass, weights = _cluster_softmax(mu, k, is_summarised)
    return Summaries(log_mass, (weights @ k).transpose(2, 3), (weights @ v).transpose(2, 3))


def summaries_backward(
    mu: Tensor, k: Tensor, v: Tensor, is_summarised: Tensor, summary: Summaries, gradient: Summaries
) -> tuple[Tensor, Tensor]:
    """dk, dv [B, T, M', K', D] of the keys behind the summaries; mu is a constant.

    g_j = p_j (dA + dkbar . (k_j - kbar) + dvbar . (v_j - vbar))
    dk_j = sum_a g_j mu_a + p_j dkbar        dv_j = sum_a p_j dvbar
    """
    _, weights = _cluster_softmax(mu, k, is_summarised)  # [B, T, M', A, K']
    dkbar, dvbar = gradient.kbar.transpose(2, 3), gradient.vbar.transpose(2, 3)  # [B, T, M', A, D]
    at_0 = gradient.log_mass - (gradient.kbar * summary.kbar).sum(-1) - (gradient.vbar * summary.vbar).sum(-1)
    g = weights * (at_0.transpose(2, 3).unsqueeze(-1) + dkbar @ k.mT + dvbar @ v.mT)
    dk = g.mT @ mu.unsqueeze(2) + weights.mT @ dkbar
    return dk, weights.mT @ dvbar


def _cluster_softmax(mu: Tensor, k: Tensor, is_summarised: Tensor) -> tuple[Tensor, Tensor]:
    """A_aB [B, T, A, M'] and p_j [B, T, M', A, K'] of keys k around mu."""
    logits = (mu.unsqueeze(2) @ k.mT).masked_fill_(~is_summarised, -math.inf)
    log_mass = logits.logsumexp(-1, keepdim=True)
    weights = (logits - log_mass.clamp(min=torch.finfo(k.dtype).min)).exp_()
    return log_mass.squeeze(-1).transpose(2, 3), weights


def summary_logits(q: Tensor, mu: Tensor, summary: Summaries, in_sight: Tensor, order: int) -> Tensor:
    """A_aB + (q - mu_a) . kbar_aB (order 0: A_aB): [B, T, A, S, M']; -inf where not `in_sight` [A, M']."""
    logits = summary.log_mass.unsqueeze(3)
    if order == 1:
        logits = logits + (q - mu.unsqueeze(3)) @ summary.kbar.mT
    return logits.expand(*q.shape[:4], -1).masked_fill(~in_sight[:, None], -math.inf)


# ------------------------------------------------------------------------------------------------------ selection


def key_spread(k: Tensor, is_key: Tensor) -> Tensor:
    """Trace of the key covariance in each cluster: [B, T, M] for k [B, T, M, K, D]."""
    weight = is_key.to(k.dtype).unsqueeze(-1)
    count = weight.sum(-2, keepdim=True).clamp(min=1)
    centred = (k - (k * weight).sum(-2, keepdim=True) / count) * weight
    return centred.square().sum((-2, -1)) / count.squeeze((-2, -1))


def cluster_mass(mean: Tensor, k: Tensor, is_key: Tensor) -> Tensor:
    """logsumexp of mean . k_j over each key cluster: [B, T, A, M].

    Args:
        mean: of the queries of each cluster, [B, T, A, D]. k: [B, T, M, K, D]. is_key: bool [M, K].
    """
    logits = (mean.unsqueeze(2) @ k.mT).masked_fill_(~is_key[:, None], -math.inf)
    return logits.logsumexp(-1).transpose(2, 3)


def coarse_score(log_mass: Tensor, q: Tensor, spread: Tensor, is_query: Tensor) -> Tensor:
    """Log-mass for the mean query plus what the spread of keys adds to it on average: [B, T, A, M].

    The second-order term of the log-mass, 1/2 q^T Cov_b q, with half of the covariance's trace spread over all
    directions alike: A + |q|^2 spread_b / (4 D), |q|^2 the mean over the cluster's queries.

    Args:
        log_mass: [B, T, A, M]. q: [B, T, A, S, D]. spread: [B, T, 1, M]. is_query: bool [A, S].
    """
    count = is_query.sum(-1).clamp(min=1)
    return log_mass + spread * (q.square().sum((-2, -1)) / (count * 4 * q.shape[-1])).unsqueeze(-1)


def peak_mass(peaks: Tensor, near_lse: Tensor, is_query: Tensor) -> Tensor:
    """log sum_{q in a} exp(peak_b(q) - L'_q), L'_q over the near field and all peaks: [B, T, A, candidates].

    Args:
        peaks: [B, T, A, S, candidates]. near_lse: [B, T, A, S]. is_query: bool [A, S].
    """
    normaliser = torch.logaddexp(near_lse, peaks.logsumexp(-1))
    share = peaks - normaliser.unsqueeze(-1)
    return share.masked_fill(~is_query[..., None], -math.inf).logsumexp(-2)


def cluster_peaks(q: Tensor, k: Tensor, is_key: Tensor, candidates: Tensor) -> Tensor:
    """Largest logit of each candidate's keys: [B, T, A, S, candidates], -inf for no candidate.

    Args:
        q: [B, T, A, S, D]. k: [B, T, M, K, D]. is_key: bool [M, K]. candidates: [B, T, A, candidates], -1 for none.
    """
    index = candidates.long().clamp(min=0)
    has_key = (is_key[index] & (candidates >= 0).unsqueeze(-1)).flatten(3)
    logits = (q @ _take_clusters(k, index).mT).masked_fill_(~has_key.unsqueeze(3), -math.inf)
    return logits.unflatten(-1, (-1, k.shape[3])).amax(-1)


def select(scores: Tensor, in_sight: Tensor, top_k: int) -> Tensor:
    """The `top_k` key clusters with the largest scores [..., A, M] among those `in_sight` [A, M].

    Returns:
        int32 [..., A, top_k], ascending, then -1 where fewer are in sight.
    """
    scores = scores.masked_fill(~in_sight | scores.isnan(), -math.inf)
    best, selected = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    none = torch.iinfo(torch.int32).max
    selected = selected.to(torch.int32).masked_fill(~(best > -math.inf), none).sort(-1).values
    selected = selected.masked_fill(selected == none, -1)
    return torch.nn.functional.pad(selected, (0, top_k - selected.shape[-1]), value=-1)


# ------------------------------------------------------------------------------------------------------ far field


class FarField(NamedTuple):
    """The far keys of each query cluster: summaries, and the keys of retrieved clusters."""

    summary_logits: Tensor
    """[B, T, A, S, M'], -inf for those out of sight or without keys."""
    retrieved_logits: Tensor
    """[B, T, A, S, R * K], -inf at empty places."""
    retrieved_k: Tensor
    """[B, T, A, R * K, D]"""
    retrieved_v: Tensor
    """[B, T, A, R * K, D]"""


def retrieved_clusters(selected: Tensor, num_key_clusters: int) -> Tensor:
    """bool [B, T, A, M]: which of M key clusters are in the list [B, T, A, R] of retrieved ones, -1 for none."""
    index = selected.long().masked_fill(selected < 0, num_key_clusters)
    is_retrieved = torch.zeros(*index.shape[:3], num_key_clusters + 1, dtype=torch.bool, device=selected.device)
    return is_retrieved.scatter_(3, index, True)[..., :-1]


def far_keys(q: Tensor, k: Tensor, v: Tensor, is_key: Tensor, summary_logits: Tensor, selected: Tensor) -> FarField:
    """Gather the keys of the retrieved clusters beside the summaries.

    Args:
        q: [B, T, A, S, D]. k, v: [B, T, M, K, D]. is_key: [M, K]. selected: [B, T, A, R], -1 for none.
    """
    index = selected.long().clamp(min=0)
    has_key = (is_key[index] & (selected >= 0).unsqueeze(-1)).flatten(3)  # [B, T, A, R * K]
    retrieved_k, retrieved_v = (_take_clusters(x, index) for x in (k, v))
    retrieved_logits = (q @ retrieved_k.mT).masked_fill_(~has_key.unsqueeze(3), -math.inf)
    return FarField(summary_logits, retrieved_logits, retrieved_k, retrieved_v)


def _take_clusters(x: Tensor, index: Tensor) -> Tensor:
    """Clusters of x [B, T, M, K, D] by index [B, T, A, R]: [B, T, A, R * K, D]."""
    flat = index.flatten(2)[..., None, None].expand(-1, -1, -1, *x.shape[3:])
    return x.gather(2, flat).unflatten(2, index.shape[2:]).flatten(3, 4)


def far_field(far: FarField, vbar: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over summaries and retrieved keys together: out [B, T, A, S, D], lse [B, T, A, S]; no key: 0 and -inf."""
    lse = torch.logaddexp(far.summary_logits.logsumexp(-1), far.retrieved_logits.logsumexp(-1))
    finite_lse = lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)
    out = (far.summary_logits - finite_lse).exp_() @ vbar
    return out + (far.retrieved_logits - finite_lse).exp_() @ far.retrieved_v, lse


def far_field_backward(
    dout: Tensor, q: Tensor, mu: Tensor, far: FarField, summary: Summaries, lse: Tensor, delta: Tensor, order: int
) -> tuple[Tensor, Summaries]:
    """dq (without the retrieved keys' part) and the gradients of the summaries.

    Args:
        dout, q: [B, T, A, S, D]. mu: [B, T, A, D]. lse, delta: [B, T, A, S], of the merged output.
    """
    weights = (far.summary_logits - lse.unsqueeze(-1)).exp_()
    dlogits = weights * (dout @ summary.vbar.mT - delta.unsqueeze(-1))
    dvbar = weights.mT @ dout
    if order == 0:
        return torch.zeros_like(q), Summaries(dlogits.sum(3), torch.zeros_like(summary.kbar), dvbar)
    return dlogits @ summary.kbar, Summaries(dlogits.sum(3), dlogits.mT @ (q - mu.unsqueeze(3)), dvbar)


def retrieved_backward(
    dout: Tensor, q: Tensor, far: FarField, selected: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> Tensor:
    """Gradients through the retrieved keys: returns dq [B, T, A, S, D], adds to dk and dv [B, T, M, K, D] in place."""
    weights = (far.retrieved_logits - lse.unsqueeze(-1)).exp_()
    dlogits = weights * (dout @ far.retrieved_v.mT - delta.unsqueeze(-1))
    index = selected.long().clamp(min=0).flatten(2)[..., None, None].expand(-1, -1, -1, *dk.shape[3:])
    # Empty places (-1) carry weight 0: they add nothing to the cluster 0 that they point at.
    dk.scatter_add_(2, index, (dlogits.mT @ q).unflatten(3, (-1, dk.shape[3])).flatten(2, 3))
    dv.scatter_add_(2, index, (weights.mT @ dout).unflatten(3, (-1, dv.shape[3])).flatten(2, 3))
    return dlogits @ far.retrieved_k


def merge_by_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two attention results over disjoint sets of keys.

    Args:
        out_a, out_b: [..., D]. Each the softmax average over its own keys.
        lse_a, lse_b: [...], natural log; -inf marks a row that saw no key.
    Returns:
        out [..., D] and lse [...]. A row that saw no key at all gives out 0, lse -inf.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    finite_lse = lse.clamp(min=torch.finfo(lse.dtype).min)
    weight_a, weight_b = ((part - finite_lse).exp().unsqueeze(-1) for part in (lse_a, lse_b))
    return out_a * weight_a + out_b * weight_b, lse
