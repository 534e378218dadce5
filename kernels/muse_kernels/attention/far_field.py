"""The far field of a query cluster: summaries, then retrieved keys, in one softmax begun by the near field.

    logit_ab(q) = scale q . kbar_ab + bias_ab    value vbar_ab     for clusters not retrieved (bias -inf switches off)
    logit_j(q)  = scale q . k_j                  value v_j         for keys j of the retrieved clusters

Sum and output start as the near field's, so that what is left at the end is the merged result; queries are read, and
results written, in token order. Weights count relative to the largest of the near lse and the retrieved keys' logits,
if selection knows it: then nothing is rescaled on the way, and the pass is repeated with a running maximum in the rare
case that a summary lies so far above that sums are out of range.
Backward, with the merged o and lse L:

    P = exp(logit - L)      dlogit = P (do . value - do . o)      dq = scale sum dlogit key
    dA = sum_q dlogit       dkbar = scale sum_q dlogit (q - mu_a)      dvbar = sum_q P do

dkbar and dvbar replace kbar and vbar in the workspace, tile by tile.
"""

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
from muse_kernels.attention.key_gradients import ClusteredQueries
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.summaries import Summaries, SummaryLayout
from muse_kernels.attention.tiles import tile_of

LARGEST_MASS = tl.constexpr(2.0**64)
LARGEST_HALF_MASS = tl.constexpr(2.0**15)
"""Of all keys relative to the reference. A float has room for values of up to 2^63 times that, half precision for the
weight alone."""


@triton.jit
def _attend(q, k, v, bias, largest, mass, out, scale_log2, HAS_QK: tl.constexpr, IS_ONLINE: tl.constexpr):
    """One tile of keys [columns, D] in the softmax of queries [Q, D]; `largest` changes only if IS_ONLINE."""
    if HAS_QK:
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias[None, :]
    else:
        logits = tl.zeros([q.shape[0], v.shape[0]], tl.float32) + bias[None, :]
    if IS_ONLINE:
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        rescale = tl.exp2(largest - new_largest)
        largest, mass, out = new_largest, mass * rescale, out * rescale[:, None]
    weights = tl.exp2(logits - largest[:, None])
    mass += tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
    return largest, mass, out


@triton.jit
def _sweep(
    q_rows,
    kbar,
    vbar,
    bias,
    columns,
    clustered_k,
    clustered_v,
    entries,
    num_retrieved,
    length,
    largest,
    mass,
    total,
    scale_log2,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ORDER: tl.constexpr,
    IS_ONLINE: tl.constexpr,
):
    """Summaries, then retrieved keys, on top of the near field: maximum, mass relative to it, output times mass."""
    d = tl.arange(0, BLOCK_D)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        # Past the end the last summary stands in, with weight 0: no mask for every element.
        source = tl.minimum(column, columns - 1)[:, None] * BLOCK_D + d[None, :]
        key_mean = operand(tl.load(kbar + source))
        value_mean = operand(tl.load(vbar + source))
        log_mass = tl.load(bias + column, mask=column < columns, other=float("-inf"))
        largest, mass, total = _attend(
            q_rows, key_mean, value_mean, log_mass, largest, mass, total, scale_log2, ORDER == 1, IS_ONLINE
        )
    PARTS: tl.constexpr = K // KEYS
    for step in range(num_retrieved * PARTS):
        cluster, num_keys = listed_cluster(entries + step // PARTS, length, K, KEY_CLUSTERS, CAUSAL)
        is_cluster = num_keys > 0  # else nothing is loaded: 0 times NaN is NaN
        key = (step % PARTS) * KEYS + tl.arange(0, KEYS)
        keys = (cluster * K + key)[:, None] * BLOCK_D + d[None, :]
        k = operand(tl.load(clustered_k + keys, mask=is_cluster, other=0.0))
        v = operand(tl.load(clustered_v + keys, mask=is_cluster, other=0.0))
        no_key = tl.where(key < num_keys, 0.0, float("-inf"))
        largest, mass, total = _attend(q_rows, k, v, no_key, largest, mass, total, scale_log2, True, IS_ONLINE)
    return largest, mass, total


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_head", "num_heads", "num_tokens", "capacity", "top_k"])
def muse_far(
    q,
    out,
    lse,
    query_order,
    selected,
    reference,
    kbar,
    vbar,
    bias,
    clustered_k,
    clustered_v,
    first_cluster,
    num_far,
    offset,
    length,
    q_stride_batch,
    q_stride_head,
    q_stride_token,
    num_rows,
    first_row,
    first_head,
    num_heads,
    num_tokens,
    capacity,
    top_k,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ORDER: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
):
    """One program for each query cluster; adds the far field to its rows of out and lse."""
    a, local_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the most summaries first
    row, head, number, token = query_cluster(
        query_order, a, local_head, first_row, first_head, num_rows, G, Q, QUERY_CLUSTERS
    )
    columns = tl.load(num_far + row)
    is_query = token >= 0
    if (columns == 0) | (tl.sum(is_query.to(tl.int32)) == 0):
        return

    d = tl.arange(0, BLOCK_D)
    is_row = is_query[:, None] & (d < D)[None, :]
    q_rows = operand(token_rows(q, token, head, num_heads, q_stride_batch, q_stride_head, q_stride_token, D, BLOCK_D))
    out_rows = out + (head * num_tokens + token)[:, None] * D + d[None, :]
    base = local_head.to(tl.int64) * capacity + tl.load(offset + row) - tl.load(offset + first_row)
    base += (a % QUERY_CLUSTERS) * columns
    kbar, vbar, bias = kbar + base * BLOCK_D, vbar + base * BLOCK_D, bias + base
    first_key = (local_head // G).to(tl.int64) * num_rows * KEY_CLUSTERS * K * BLOCK_D
    clustered_k, clustered_v, entries = clustered_k + first_key, clustered_v + first_key, selected + number * top_k
    num_retrieved = tl.minimum(top_k, columns)
    lse += head * num_tokens + token

    near_lse = tl.load(lse, mask=is_query, other=0.0) * LOG2E
    total = tl.load(out_rows, mask=is_row, other=0.0).to(tl.float32)
    largest, mass = near_lse, tl.full([Q], 1.0, tl.float32)
    if HAS_REFERENCE:
        largest = tl.load(reference + head * num_tokens + token, mask=is_query, other=0.0)
        mass = tl.exp2(near_lse - largest)
        total *= mass[:, None]
    largest, mass, total = _sweep(
        q_rows,
        kbar,
        vbar,
        bias,
        columns,
        clustered_k,
        clustered_v,
        entries,
        num_retrieved,
        length,
        largest,
        mass,
        total,
        scale_log2,
        BLOCK_D,
        K,
        KEY_CLUSTERS,
        COLUMNS,
        KEYS,
        CAUSAL,
        ORDER,
        IS_ONLINE=not HAS_REFERENCE,
    )
    if HAS_REFERENCE:
        LIMIT: tl.constexpr = LARGEST_HALF_MASS if q.dtype.element_ty == tl.float16 else LARGEST_MASS
        if tl.max((mass > LIMIT).to(tl.int32)) > 0:
            largest, mass = tl.load(lse, mask=is_query, other=0.0) * LOG2E, tl.full([Q], 1.0, tl.float32)
            total = tl.load(out_rows, mask=is_row, other=0.0).to(tl.float32)
            largest, mass, total = _sweep(
                q_rows,
                kbar,
                vbar,
                bias,
                columns,
                clustered_k,
                clustered_v,
                entries,
                num_retrieved,
                length,
                largest,
                mass,
                total,
                scale_log2,
                BLOCK_D,
                K,
                KEY_CLUSTERS,
                COLUMNS,
                KEYS,
                CAUSAL,
                ORDER,
                IS_ONLINE=True,
            )

    tl.store(out_rows, (total / mass[:, None]).to(out.dtype.element_ty), mask=is_row)
    tl.store(lse, (largest + tl.log2(mass)) / LOG2E, mask=is_query)


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
    dmass,
    first_cluster,
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
    IS_ROOMY: tl.constexpr,
    CAUSAL: tl.constexpr,
    ORDER: tl.constexpr,
):
    """One program for each query cluster; adds to its rows of dq, replaces kbar, vbar by their gradients.

    IS_ROOMY: shared memory has room for q - mu beside q, so that sums over queries can be products.
    """
    a, local_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the most summaries first
    row, head, number, token = query_cluster(
        query_order, a, local_head, first_row, first_head, num_rows, G, Q, QUERY_CLUSTERS
    )
    columns = tl.load(num_far + row)
    is_query = token >= 0
    d = tl.arange(0, BLOCK_D)
    base = local_head.to(tl.int64) * capacity + tl.load(offset + row) - tl.load(offset + first_row)
    base += (a % QUERY_CLUSTERS) * columns
    if columns == 0:
        return

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
    if IS_ROOMY:
        point = tl.load(mu + number * D + d, mask=d < D, other=0.0).to(tl.float32)
        offsets = operand((q_rows.to(tl.float32) - point[None, :]).to(q_rows.dtype))
    q_rows, dout_rows = operand(q_rows), operand(dout_rows)
    if IS_ROOMY:
        ones = tl.full([Q, 16], 1.0, q_rows.dtype)
    total = tl.zeros([Q, BLOCK_D], tl.float32)

    scale_log2 = scale * LOG2E
    kbar, vbar, bias, dmass = kbar + base * BLOCK_D, vbar + base * BLOCK_D, bias + base, dmass + base
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_column = column < columns
        place = column[:, None] * BLOCK_D + d[None, :]
        # Past the end the last summary stands in, with weight 0: no mask for every element.
        source = tl.minimum(column, columns - 1)[:, None] * BLOCK_D + d[None, :]
        key_mean = operand(tl.load(kbar + source))
        value_mean = operand(tl.load(vbar + source))
        log_mass = tl.load(bias + column, mask=is_column, other=float("-inf"))
        if ORDER == 1:
            logits = tl.dot(q_rows, tl.trans(key_mean), input_precision="ieee") * scale_log2 + log_mass[None, :]
        else:
            logits = tl.zeros([Q, COLUMNS], tl.float32) + log_mass[None, :]
        weights = tl.exp2(logits - lse_rows[:, None])
        dweights = tl.dot(dout_rows, tl.trans(value_mean), input_precision="ieee")
        dlogits = weights * (dweights - delta[:, None])
        weights = weights.to(q_rows.dtype)
        if IS_ROOMY:
            dvalue_mean = tl.trans(tl.dot(tl.trans(dout_rows), weights, input_precision="ieee"))
        else:
            dvalue_mean = tl.dot(tl.trans(weights), dout_rows, input_precision="ieee")
        tl.store(vbar + place, dvalue_mean.to(vbar.dtype.element_ty), mask=is_column[:, None])
        if ORDER == 1:
            dlogits = (dlogits * scale).to(q_rows.dtype)
            total = tl.dot(dlogits, key_mean, total, input_precision="ieee")
        if IS_ROOMY:
            # Sums over queries as products wait for no other warp: less time, but memory for q - mu beside q.
            by_query = tl.trans(dlogits.to(q_rows.dtype))
            sums = tl.dot(by_query, ones, input_precision="ieee")
            pair = dmass + column[:, None] + tl.arange(0, 16)[None, :]
            sums = sums / scale if ORDER == 1 else sums
            tl.store(pair, sums, mask=is_column[:, None] & (tl.arange(0, 16) == 0)[None, :])
            if ORDER == 1:
                dkey_mean = tl.dot(by_query, offsets, input_precision="ieee")
        else:
            # Summed as rounded for the product, or mu, larger than q - mu, would not cancel.
            sums = tl.sum(dlogits.to(tl.float32), 0)
            tl.store(dmass + column, sums / scale if ORDER == 1 else sums, mask=is_column)
            if ORDER == 1:
                dkey_mean = tl.dot(tl.trans(dlogits), q_rows, input_precision="ieee")
                # Read here: kept over the loop it would take registers that nothing else leaves free.
                point = tl.load(mu + number * D + d, mask=d < D, other=0.0).to(tl.float32)
                dkey_mean -= sums[:, None] * point[None, :]
        if ORDER == 0:
            dkey_mean = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
        tl.store(kbar + place, dkey_mean.to(kbar.dtype.element_ty), mask=is_column[:, None])

    first_key = (local_head // G).to(tl.int64) * num_rows * KEY_CLUSTERS * K * BLOCK_D
    clustered_k, clustered_v = clustered_k + first_key, clustered_v + first_key
    num_retrieved = top_k if top_k < columns else columns
    PARTS: tl.constexpr = K // KEYS
    for step in range(num_retrieved * PARTS):
        entries = selected + number * top_k + step // PARTS
        cluster, num_keys = listed_cluster(entries, length, K, KEY_CLUSTERS, CAUSAL)
        is_cluster = num_keys > 0  # else nothing is loaded: 0 times NaN is NaN
        key = (step % PARTS) * KEYS + tl.arange(0, KEYS)
        keys = (cluster * K + key)[:, None] * BLOCK_D + d[None, :]
        k = operand(tl.load(clustered_k + keys, mask=is_cluster, other=0.0))
        v = operand(tl.load(clustered_v + keys, mask=is_cluster, other=0.0))
        logits = tl.dot(q_rows, tl.trans(k), input_precision="ieee") * scale_log2
        weights = tl.exp2(logits - lse_rows[:, None])
        weights = tl.where((key < num_keys)[None, :], weights, 0.0)
        dweights = tl.dot(dout_rows, tl.trans(v), input_precision="ieee")
        dlogits = (weights * (dweights - delta[:, None]) * scale).to(q_rows.dtype)
        total = tl.dot(dlogits, k, total, input_precision="ieee")

    near_dq = tl.load(dq + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq + places, (near_dq + total).to(dq.dtype.element_ty), mask=mask)


def far_field(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    query_order: Tensor,
    selected: Tensor,
    reference: Tensor | None,
    summary: Summaries,
    clustered_k: Tensor,
    clustered_v: Tensor,
    layout: SummaryLayout,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Merge the far field of a group of rows and heads into the near field's `out` and `lse`, in place.

    Args:
        q: [B, H, N, D]. out: [B, H, N, D] contiguous, dtype of q. lse: float32 [B, H, N], natural log.
        selected: int32 [B, H, C, chunk / query_cluster, top_k].
        reference: what `select_clusters` left, or None if it chose nothing key by key.
        summary: of these rows and heads, retrieved clusters switched off.
        clustered_k, clustered_v: [heads, C * chunk, padded D].
    """
    q = rows_contiguous(q)
    head_dim, num_rows = q.shape[-1], layout.num_far.shape[0]
    tile = tile_of("far", q)
    tile["KEYS"] = min(tile["KEYS"], options.key_cluster)
    muse_far[(group.num_rows * options.query_clusters, summary.kbar.shape[0])](
        q,
        out,
        lse,
        query_order,
        selected,
        lse if reference is None else reference,
        *summary,
        clustered_k,
        clustered_v,
        *layout[:4],
        *q.stride()[:3],
        num_rows,
        group.rows.start,
        group.heads.start,
        q.shape[1],
        q.shape[2],
        summary.bias.shape[1],
        options.top_k,
        options.softmax_scale * LOG2E.value,
        G=summary.kbar.shape[0] // group.num_heads,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        Q=options.query_cluster,
        K=options.key_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        KEY_CLUSTERS=options.key_clusters,
        CAUSAL=options.causal,
        ORDER=options.order,
        HAS_REFERENCE=reference is not None,
        **tile,
    )


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
    dmass: Tensor,
    layout: SummaryLayout,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Add the far field's dq to `dq` in place; write dkbar and dvbar over the summaries, dA into `dmass`.

    Args:
        dout, q: [B, H, N, D]. out, dq: the same, contiguous. lse: float32 [B, H, N]. out and lse: merged.
        mu: dtype of q [B, H, C, chunk / query_cluster, D].
        clustered: buffers that this fills for `key_gradients`.
        dmass: float32, shape of `summary.bias`.
    """
    q, dout = rows_contiguous(q), rows_contiguous(dout)
    head_dim, num_rows = q.shape[-1], layout.num_far.shape[0]
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
        *summary,
        clustered_k,
        clustered_v,
        *clustered,
        dmass,
        *layout[:4],
        *q.stride()[:3],
        *dout.stride()[:3],
        num_rows,
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
        CAUSAL=options.causal,
        ORDER=options.order,
        **tile,
    )
