"""The far field of a query cluster: summaries, then retrieved keys, in one softmax begun by the near field.

    logit_aB(q) = scale q . kbar_aB + bias_aB    value vbar_aB     for summaries (bias -inf: out of sight)
    logit_j(q)  = scale q . k_j                  value v_j         for keys j of the retrieved clusters

Maximum, sum and output start as the near field's, so that what is left at the end is the merged result; queries are
read, and results written, in token order. The way back is in `far_field_backward.py`.
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
from muse_kernels.attention.layout import FarLayout, far_place
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.summaries import Summaries
from muse_kernels.attention.tiles import tile_of


@triton.jit
def _attend(logits, v, largest, mass, out):
    """One tile of logits [Q, keys], with values [keys, D], in the softmax of Q queries."""
    new_largest = tl.maximum(largest, tl.max(logits, 1))
    rescale = tl.exp2(largest - new_largest)
    weights = tl.exp2(logits - new_largest[:, None])
    mass = mass * rescale + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
    return new_largest, mass, out


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_head", "num_heads", "num_tokens", "capacity", "top_k"])
def muse_far(
    q,
    out,
    lse,
    query_order,
    selected,
    kbar,
    vbar,
    bias,
    clustered_k,
    clustered_v,
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
    PER_SUMMARY: tl.constexpr,
    CAUSAL: tl.constexpr,
    ORDER: tl.constexpr,
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
    lse += head * num_tokens + token
    largest, mass = tl.load(lse, mask=is_query, other=0.0) * LOG2E, tl.full([Q], 1.0, tl.float32)
    total = tl.load(out_rows, mask=is_row, other=0.0).to(tl.float32)

    base = far_place(offset, first_row, row, a % QUERY_CLUSTERS, columns, local_head, capacity)
    kbar, vbar, bias = kbar + base * BLOCK_D, vbar + base * BLOCK_D, bias + base
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        # Past the end the last summary stands in, with weight 0: no mask for every element.
        source = tl.minimum(column, columns - 1)[:, None] * BLOCK_D + d[None, :]
        value_mean = operand(tl.load(vbar + source))
        logits = tl.zeros([Q, COLUMNS], tl.float32)
        logits += tl.load(bias + column, mask=column < columns, other=float("-inf"))[None, :]
        if ORDER == 1:
            key_mean = operand(tl.load(kbar + source))
            logits += tl.dot(q_rows, tl.trans(key_mean), input_precision="ieee") * scale_log2
        largest, mass, total = _attend(logits, value_mean, largest, mass, total)

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
        logits = tl.where((key < num_keys)[None, :], logits, float("-inf"))
        largest, mass, total = _attend(logits, v, largest, mass, total)

    tl.store(out_rows, (total / mass[:, None]).to(out.dtype.element_ty), mask=is_row)
    tl.store(lse, (largest + tl.log2(mass)) / LOG2E, mask=is_query)


def far_field(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    query_order: Tensor,
    selected: Tensor,
    summary: Summaries,
    clustered_k: Tensor,
    clustered_v: Tensor,
    layout: FarLayout,
    table: ChunkTable,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Merge the far field of a group of rows and heads into the near field's `out` and `lse`, in place.

    Args:
        q: [B, H, N, D]. out: [B, H, N, D] contiguous, dtype of q. lse: float32 [B, H, N], natural log.
        selected: int32 [B, H, C, chunk / query_cluster, top_k].
        summary: of these rows and heads.
        clustered_k, clustered_v: [heads, C * chunk, padded D].
        layout: of summaries.
    """
    q = rows_contiguous(q)
    head_dim = q.shape[-1]
    tile = tile_of("far", q)
    tile["KEYS"] = min(tile["KEYS"], options.key_cluster)
    muse_far[(group.num_rows * options.query_clusters, summary.kbar.shape[0])](
        q,
        out,
        lse,
        query_order,
        selected,
        *summary[:3],
        clustered_k,
        clustered_v,
        layout.num_far,
        layout.offset,
        table.length,
        *q.stride()[:3],
        table.start.shape[0],
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
        PER_SUMMARY=options.key_clusters_per_summary,
        CAUSAL=options.causal,
        ORDER=options.order,
        **tile,
    )
