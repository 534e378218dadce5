"""Gradients of the far field of a query cluster: of its queries, and of its summaries.

With the merged output o and lse L, and logits and values as in `far_field.py`,

    P = exp(logit - L)      dlogit = P (do . value - do . o)      dq = scale sum dlogit key
    dA = sum_q dlogit       dkbar = scale sum_q dlogit (q - mu_a)      dvbar = sum_q P do

dkbar and dvbar replace kbar and vbar in the workspace, tile by tile, and dA - dkbar . kbar - dvbar . vbar goes beside
them, which is what every key of a summary needs to know (`key_gradients.py`).
"""

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
from muse_kernels.attention.key_gradients import ClusteredQueries
from muse_kernels.attention.layout import FarLayout, far_place
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.summaries import Summaries
from muse_kernels.attention.tiles import tile_of


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_head", "num_heads", "num_tokens", "capacity", "top_k"])
def muse_far_backward(
    q,
    out,
    dout,
    lse,
    dq,
    query_order,
    selected,
    mu,
    kbar,
    vbar,
    bias,
    clustered_k,
    clustered_v,
    clustered_q,
    clustered_dout,
    clustered_lse,
    clustered_delta,
    dmass_at_0,
    num_far,
    offset,
    length,
    q_stride_batch,
    q_stride_head,
    q_stride_token,
    dout_stride_batch,
    dout_stride_head,
    dout_stride_token,
    num_rows,
    first_row,
    first_head,
    num_heads,
    num_tokens,
    capacity,
    top_k,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    PER_SUMMARY: tl.constexpr,
    CAUSAL: tl.constexpr,
    ORDER: tl.constexpr,
):
    """One program for each query cluster; adds to its rows of dq, replaces kbar, vbar by their gradients."""
    a, local_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the most summaries first
    row, head, number, token = query_cluster(
        query_order, a, local_head, first_row, first_head, num_rows, G, Q, QUERY_CLUSTERS
    )
    columns = tl.load(num_far + row)
    if columns == 0:
        return

    d = tl.arange(0, BLOCK_D)
    is_query = token >= 0
    mask = is_query[:, None] & (d < D)[None, :]
    places = (head * num_tokens + token)[:, None] * D + d[None, :]
    q_rows = token_rows(q, token, head, num_heads, q_stride_batch, q_stride_head, q_stride_token, D, BLOCK_D)
    dout_rows = token_rows(
        dout, token, head, num_heads, dout_stride_batch, dout_stride_head, dout_stride_token, D, BLOCK_D
    )
    out_rows = tl.load(out + places, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(dout_rows.to(tl.float32) * out_rows, 1)
    # An empty place has weight 0 everywhere.
    lse_rows = tl.load(lse + head * num_tokens + token, mask=is_query, other=float("inf")) * LOG2E
    local = (local_head.to(tl.int64) * tl.num_programs(0) + a) * Q + tl.arange(0, Q)
    tl.store(clustered_q + local[:, None] * BLOCK_D + d[None, :], q_rows)
    tl.store(clustered_dout + local[:, None] * BLOCK_D + d[None, :], dout_rows)
    tl.store(clustered_lse + local, lse_rows)
    tl.store(clustered_delta + local, delta)
    q_rows, dout_rows = operand(q_rows), operand(dout_rows)
    total = tl.zeros([Q, BLOCK_D], tl.float32)

    scale_log2 = scale * LOG2E
    base = far_place(offset, first_row, row, a % QUERY_CLUSTERS, columns, local_head, capacity)
    kbar, vbar, bias, dmass_at_0 = kbar + base * BLOCK_D, vbar + base * BLOCK_D, bias + base, dmass_at_0 + base
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_column = column < columns
        place = column[:, None] * BLOCK_D + d[None, :]
        # Past the end the last summary stands in, with weight 0: no mask for every element.
        source = tl.minimum(column, columns - 1)[:, None] * BLOCK_D + d[None, :]
        value_mean = operand(tl.load(vbar + source))
        logits = tl.zeros([Q, COLUMNS], tl.float32)
        logits += tl.load(bias + column, mask=is_column, other=float("-inf"))[None, :]
        if ORDER == 1:
            key_mean = operand(tl.load(kbar + source))
            logits += tl.dot(q_rows, tl.trans(key_mean), input_precision="ieee") * scale_log2
        weights = tl.exp2(logits - lse_rows[:, None])
        dweights = tl.dot(dout_rows, tl.trans(value_mean), input_precision="ieee")
        # As rounded for the products, also where they are summed: mu, larger than q - mu, would not cancel otherwise.
        dlogits = (weights * (dweights - delta[:, None])).to(q_rows.dtype)
        sums = tl.sum(dlogits.to(tl.float32), 0)
        dvalue_mean = tl.dot(tl.trans(weights.to(q_rows.dtype)), dout_rows, input_precision="ieee")
        dvalue_mean = dvalue_mean.to(vbar.dtype.element_ty)
        at_0 = sums - tl.sum(dvalue_mean.to(tl.float32) * value_mean.to(tl.float32), 1)
        tl.store(vbar + place, dvalue_mean, mask=is_column[:, None])
        if ORDER == 1:
            total = tl.dot(dlogits, key_mean, total, input_precision="ieee")
            dkey_mean = tl.dot(tl.trans(dlogits), q_rows, input_precision="ieee")
            point = tl.load(mu + number * D + d, mask=d < D, other=0.0).to(tl.float32)
            dkey_mean = ((dkey_mean - sums[:, None] * point[None, :]) * scale).to(kbar.dtype.element_ty)
            at_0 -= tl.sum(dkey_mean.to(tl.float32) * key_mean.to(tl.float32), 1)
        else:
            dkey_mean = tl.zeros([COLUMNS, BLOCK_D], kbar.dtype.element_ty)
        tl.store(kbar + place, dkey_mean, mask=is_column[:, None])
        tl.store(dmass_at_0 + column, at_0, mask=is_column)

    first_key = (local_head // G).to(tl.int64) * num_rows * KEY_CLUSTERS * K * BLOCK_D
    clustered_k, clustered_v = clustered_k + first_key, clustered_v + first_key
    PARTS: tl.constexpr = K // KEYS
    for step in range(tl.minimum(top_k, columns * PER_SUMMARY) * PARTS):
        cluster, num_keys = listed_cluster(selected + number * top_k + step // PARTS, length, K, KEY_CLUSTERS, CAUSAL)
        is_cluster = num_keys > 0  # else nothing is loaded: 0 times NaN is NaN
        key = (step % PARTS) * KEYS + tl.arange(0, KEYS)
        keys = (cluster * K + key)[:, None] * BLOCK_D + d[None, :]
        k = operand(tl.load(clustered_k + keys, mask=is_cluster, other=0.0))
        v = operand(tl.load(clustered_v + keys, mask=is_cluster, other=0.0))
        logits = tl.dot(q_rows, tl.trans(k), input_precision="ieee") * scale_log2
        weights = tl.exp2(logits - lse_rows[:, None])
        weights = tl.where((key < num_keys)[None, :], weights, 0.0)
        dweights = tl.dot(dout_rows, tl.trans(v), input_precision="ieee")
        dlogits = (weights * (dweights - delta[:, None])).to(q_rows.dtype)
        total = tl.dot(dlogits, k, total, input_precision="ieee")

    near_dq = tl.load(dq + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq + places, (near_dq + total * scale).to(dq.dtype.element_ty), mask=mask)


def far_field_backward(
    dout: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    query_order: Tensor,
    selected: Tensor,
    mu: Tensor,
    summary: Summaries,
    clustered_k: Tensor,
    clustered_v: Tensor,
    clustered: ClusteredQueries,
    dmass_at_0: Tensor,
    layout: FarLayout,
    table: ChunkTable,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Add the far field's dq to `dq` in place; write dkbar and dvbar over the summaries.

    Args:
        dout, q: [B, H, N, D]. out, dq: the same, contiguous. lse: float32 [B, H, N]. out and lse: merged.
        mu: dtype of q [B, H, C, chunk / query_cluster, D].
        clustered: buffers that this fills for `key_gradients`.
        dmass_at_0: float32, shape of `summary.bias`, filled with dA - dkbar . kbar - dvbar . vbar.
        layout: of summaries.
    """
    q, dout = rows_contiguous(q), rows_contiguous(dout)
    head_dim = q.shape[-1]
    tile = tile_of("far_backward", q)
    tile["KEYS"] = min(tile["KEYS"], options.key_cluster)
    muse_far_backward[(group.num_rows * options.query_clusters, summary.kbar.shape[0])](
        q,
        out,
        dout,
        lse,
        dq,
        query_order,
        selected,
        mu,
        *summary[:3],
        clustered_k,
        clustered_v,
        *clustered,
        dmass_at_0,
        layout.num_far,
        layout.offset,
        table.length,
        *q.stride()[:3],
        *dout.stride()[:3],
        table.start.shape[0],
        group.rows.start,
        group.heads.start,
        q.shape[1],
        q.shape[2],
        summary.bias.shape[1],
        options.top_k,
        options.softmax_scale,
        G=summary.kbar.shape[0] // group.num_heads,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        Q=options.query_cluster,
        K=options.key_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        KEY_CLUSTERS=options.key_clusters,
        PER_SUMMARY=options.key_clusters_per_summary,
        CAUSAL=options.causal,
        ORDER=options.order,
        **tile,
    )
