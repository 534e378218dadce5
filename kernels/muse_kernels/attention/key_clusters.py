"""Keys and values in cluster order.

    k_b = k[key_order_b]        v_b = v[key_order_b]        spread_b = trace of the covariance of k_b

Clusters are contiguous in memory, K rows of `padded_head_dim` columns, so that whatever reads a cluster afterwards
reads one block. Empty places are zero. The way back is the end of `key_gradients.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable
from muse_kernels.attention.common import padded_head_dim, rows_contiguous


@triton.jit(do_not_specialize=["num_clusters", "first_head", "num_kv_heads"])
def muse_gather(
    k,
    v,
    order,
    length,
    clustered_k,
    clustered_v,
    spread,
    k_stride_batch,
    k_stride_head,
    k_stride_token,
    v_stride_batch,
    v_stride_head,
    v_stride_token,
    num_clusters,
    first_head,
    num_kv_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
):
    """One program for each key cluster of each head; nobody reads those of an unused row."""
    cluster, local_head = tl.program_id(0), tl.program_id(1)
    if tl.load(length + cluster // KEY_CLUSTERS) == 0:
        return
    head = first_head + local_head
    batch, kv_head = (head // num_kv_heads).to(tl.int64), (head % num_kv_heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    places = cluster.to(tl.int64) * K + tl.arange(0, K)
    token = tl.load(order + head.to(tl.int64) * num_clusters * K + places).to(tl.int64)
    is_key = token >= 0
    mask = is_key[:, None] & (d < D)[None, :]
    k_rows = tl.load(
        k + batch * k_stride_batch + kv_head * k_stride_head + token[:, None] * k_stride_token + d[None, :],
        mask=mask,
        other=0.0,
    )
    v_rows = tl.load(
        v + batch * v_stride_batch + kv_head * v_stride_head + token[:, None] * v_stride_token + d[None, :],
        mask=mask,
        other=0.0,
    )
    target = (local_head.to(tl.int64) * num_clusters * K + places)[:, None] * BLOCK_D + d[None, :]
    tl.store(clustered_k + target, k_rows)
    tl.store(clustered_v + target, v_rows)

    count = tl.maximum(tl.sum(is_key.to(tl.float32)), 1.0)
    wide = k_rows.to(tl.float32)
    centred = tl.where(mask, wide - (tl.sum(wide, 0) / count)[None, :], 0.0)
    tl.store(spread + local_head * num_clusters + cluster, tl.sum(tl.sum(centred * centred, 1)) / count)


def gather_keys(
    k: Tensor,
    v: Tensor,
    key_order: Tensor,
    table: ChunkTable,
    heads: slice,
    *,
    key_cluster: int,
    clustered_k: Tensor,
    clustered_v: Tensor,
    spread: Tensor,
) -> None:
    """Write clusters of some key-value heads, counted over batch and heads together, into the given buffers.

    Args:
        k, v: [B, H_kv, N, D]. key_order: int32 [B, H_kv, C, chunk].
        clustered_k, clustered_v: [heads, C * chunk, padded D], dtype of k.
        spread: float32 [heads, C * chunk / key_cluster].
    """
    k, v = rows_contiguous(k), rows_contiguous(v)
    head_dim, num_kv_heads = k.shape[-1], k.shape[1]
    num_clusters = key_order.shape[2] * key_order.shape[3] // key_cluster
    muse_gather[(num_clusters, heads.stop - heads.start)](
        k,
        v,
        key_order,
        table.length,
        clustered_k,
        clustered_v,
        spread,
        *k.stride()[:3],
        *v.stride()[:3],
        num_clusters,
        heads.start,
        num_kv_heads,
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        K=key_cluster,
        KEY_CLUSTERS=key_order.shape[3] // key_cluster,
        num_warps=4,
    )
