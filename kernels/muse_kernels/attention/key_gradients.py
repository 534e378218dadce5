"""dk and dv of far keys: one key cluster at a time against all that attends to it, then back to token order.

Retrieved: over the query clusters of its inverted list (`selection.py`), with the merged L and Delta = do . o,

    P = exp(scale q . k_j - L)    dlogit = P (do . v_j - Delta)    dk_j += scale sum_q dlogit q    dv_j += sum_q P do

Summarised: over the query clusters of later chunks that do not retrieve it, with p_j and A_aB as in `summaries.py`,

    g_j = p_j (dA - dkbar . kbar - dvbar . vbar + dkbar . k_j + dvbar . v_j)
    dk_j += scale g_j mu_a + p_j dkbar            dv_j += p_j dvbar

A list is cut after LONGEST_PIECE pairs, so that a cluster that everybody retrieves does not keep one program busy for
all the others: what is left of it goes, in pieces of that length, to programs of their own that write partial results,
which are added in order. Piece i of a list that starts at pair s has the number s // LONGEST_PIECE + i, which no other
piece has, and the pair at LONGEST_PIECE times that number lies in its list. Nothing is atomic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable, Group
from muse_kernels.attention.common import LOG2E, operand, padded_head_dim
from muse_kernels.attention.layout import FarLayout
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.selection import InvertedLists
from muse_kernels.attention.summaries import Summaries
from muse_kernels.attention.tiles import tile_of

LONGEST_PIECE = 32
"""Query clusters that one program goes through for one key cluster."""


class ClusteredQueries(NamedTuple):
    """What keys need to know of queries, in query-cluster order, as `far_field_backward` leaves it."""

    q: Tensor
    """[query heads, rows * chunk, padded D]"""
    dout: Tensor
    """[query heads, rows * chunk, padded D]"""
    lse: Tensor
    """float32 [query heads, rows * chunk], base 2; infinite at empty places."""
    delta: Tensor
    """float32 [query heads, rows * chunk]: dout . out."""


@triton.jit
def _retrieved(
    k,
    v,
    dk,
    dv,
    num_keys,
    first_pair,
    end_pair,
    position,
    top_k,
    clustered_q,
    clustered_dout,
    clustered_lse,
    clustered_delta,
    scale,
    BLOCK_D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """dk and dv [K, D] with the queries of some pairs of the key cluster's list added."""
    d, query = tl.arange(0, BLOCK_D), tl.arange(0, QUERIES)
    PARTS: tl.constexpr = Q // QUERIES
    for step in range(first_pair * PARTS, end_pair * PARTS):
        query_cluster = tl.load(position + step // PARTS) // top_k
        first_query = query_cluster * Q + (step % PARTS) * QUERIES
        rows = query[:, None] * BLOCK_D + d[None, :]
        q = operand(tl.load(clustered_q + first_query * BLOCK_D + rows))
        dout = operand(tl.load(clustered_dout + first_query * BLOCK_D + rows))
        lse = tl.load(clustered_lse + first_query + query)
        delta = tl.load(clustered_delta + first_query + query)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        weights = tl.exp2(logits - lse[None, :])
        if not CAUSAL:
            weights = tl.where((tl.arange(0, K) < num_keys)[:, None], weights, 0.0)
        dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dlogits = weights * (dweights - delta[None, :]) * scale
        dv = tl.dot(weights.to(k.dtype), dout, dv, input_precision="ieee")
        dk = tl.dot(dlogits.to(k.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["num_key_clusters", "clusters_per_head", "top_k"])
def muse_retrieved_partials(
    clustered_k,
    clustered_v,
    clustered_q,
    clustered_dout,
    clustered_lse,
    clustered_delta,
    owners,
    position,
    list_start,
    length,
    partial_dk,
    partial_dv,
    num_key_clusters,
    clusters_per_head,
    top_k,
    scale,
    BLOCK_D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
    QUERIES: tl.constexpr,
    PIECE: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One program for each piece that there may be after the first ones; most have nothing to do."""
    number = tl.program_id(0)
    owner = tl.load(owners + number * PIECE)
    if owner >= num_key_clusters:
        return
    list_first, list_end = tl.load(list_start + owner), tl.load(list_start + owner + 1)
    first_pair = list_first + (number - list_first // PIECE) * PIECE
    if (first_pair == list_first) | (first_pair >= list_end):
        return
    end_pair = tl.minimum(list_end, first_pair + PIECE)
    block = tl.arange(0, K)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    keys = owner.to(tl.int64) * (K * BLOCK_D) + block
    cluster = owner % clusters_per_head
    num_keys = tl.load(length + cluster // KEY_CLUSTERS) - (cluster % KEY_CLUSTERS) * K
    dk, dv = _retrieved(
        operand(tl.load(clustered_k + keys)),
        operand(tl.load(clustered_v + keys)),
        tl.zeros([K, BLOCK_D], tl.float32),
        tl.zeros([K, BLOCK_D], tl.float32),
        num_keys,
        first_pair,
        end_pair,
        position,
        top_k,
        clustered_q,
        clustered_dout,
        clustered_lse,
        clustered_delta,
        scale,
        BLOCK_D,
        Q,
        K,
        QUERIES,
        CAUSAL,
    )
    tl.store(partial_dk + number.to(tl.int64) * (K * BLOCK_D) + block, dk)
    tl.store(partial_dv + number.to(tl.int64) * (K * BLOCK_D) + block, dv)


@triton.jit(
    do_not_specialize=[
        "first_row",
        "end_row",
        "num_rows",
        "first_head",
        "num_tokens",
        "capacity",
        "top_k",
        "is_first",
        "is_last",
    ]
)
def muse_key_gradients(
    mu,
    clustered_k,
    clustered_v,
    clustered_q,
    clustered_dout,
    clustered_lse,
    clustered_delta,
    dkbar,
    dvbar,
    dmass_at_0,
    log_mass,
    retrieved,
    position,
    list_start,
    partial_dk,
    partial_dv,
    far_dk,
    far_dv,
    dk_out,
    dv_out,
    key_order,
    first_summary,
    num_far,
    offset,
    length,
    first_of_document,
    end_of_document,
    first_row,
    end_row,
    num_rows,
    first_head,
    num_tokens,
    capacity,
    top_k,
    is_first,
    is_last,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    QUERY_CLUSTERS: tl.constexpr,
    KEY_CLUSTERS: tl.constexpr,
    PER_SUMMARY: tl.constexpr,
    QUERIES: tl.constexpr,
    A: tl.constexpr,
    SUMMARY_STAGES: tl.constexpr,
    PIECE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_RETRIEVED: tl.constexpr,
):
    """One program for each key cluster: adds to far_dk, far_dv, and in the last group of rows to dk, dv in place."""
    cluster, local_kv_head = tl.program_id(0), tl.program_id(1)
    key_row = cluster // KEY_CLUSTERS
    num_keys = tl.load(length + key_row) - (cluster % KEY_CLUSTERS) * K
    if num_keys <= 0:
        return
    d = tl.arange(0, BLOCK_D)
    key = tl.arange(0, K)
    owner = local_kv_head * num_rows * KEY_CLUSTERS + cluster
    keys = owner.to(tl.int64) * (K * BLOCK_D) + key[:, None] * BLOCK_D + d[None, :]
    dk = tl.load(far_dk + keys, mask=is_first == 0, other=0.0)
    dv = tl.load(far_dv + keys, mask=is_first == 0, other=0.0)
    k = operand(tl.load(clustered_k + keys))
    v = operand(tl.load(clustered_v + keys))

    if HAS_RETRIEVED:
        list_first, list_end = tl.load(list_start + owner), tl.load(list_start + owner + 1)
        dk, dv = _retrieved(
            k,
            v,
            dk,
            dv,
            num_keys,
            list_first,
            tl.minimum(list_end, list_first + PIECE),
            position,
            top_k,
            clustered_q,
            clustered_dout,
            clustered_lse,
            clustered_delta,
            scale,
            BLOCK_D,
            Q,
            K,
            QUERIES,
            CAUSAL,
        )
        for piece in range(1, tl.cdiv(list_end - list_first, PIECE)):
            number = tl.full([K], list_first // PIECE + piece, tl.int64)
            place = (number * K + key)[:, None] * BLOCK_D + d[None, :]
            dk += tl.load(partial_dk + place)
            dv += tl.load(partial_dv + place)

    # Rows of the group that see this cluster: later ones of its document, or any (its own holds zero gradients).
    seen_from = key_row + 1 if CAUSAL else tl.load(first_of_document + key_row)
    start = tl.maximum(seen_from, first_row) * QUERY_CLUSTERS
    stop = tl.minimum(tl.load(end_of_document + key_row), end_row) * QUERY_CLUSTERS
    summary, leaf = cluster // PER_SUMMARY, cluster % PER_SUMMARY
    group_offset = tl.load(offset + first_row)
    for g in range(G):
        local_head = local_kv_head * G + g
        head = (first_head * G + local_head).to(tl.int64)
        for first_a in tl.range(start, stop, A, num_stages=SUMMARY_STAGES):
            a = first_a + tl.arange(0, A)
            is_query_cluster = a < stop
            row = tl.where(is_query_cluster, a // QUERY_CLUSTERS, end_row - 1)
            place = (
                tl.load(offset + row)
                - group_offset
                + (a % QUERY_CLUSTERS) * tl.load(num_far + row)
                - tl.load(first_summary + row)
                + summary
                + local_head.to(tl.int64) * capacity
            )
            mask = is_query_cluster[:, None]
            mu_rows = mu + (head * num_rows * QUERY_CLUSTERS + a)[:, None] * D + d[None, :]
            mu_rows = operand(tl.load(mu_rows, mask=mask & (d < D)[None, :], other=0.0))
            dkey_mean = operand(tl.load(dkbar + place[:, None] * BLOCK_D + d[None, :], mask=mask, other=0.0))
            dvalue_mean = operand(tl.load(dvbar + place[:, None] * BLOCK_D + d[None, :], mask=mask, other=0.0))
            at_0 = tl.load(dmass_at_0 + place, mask=is_query_cluster, other=0.0)
            mass = tl.load(log_mass + place, mask=is_query_cluster, other=0.0)
            bits = tl.load(retrieved + place, mask=is_query_cluster, other=-1)
            is_summarised = (((bits >> leaf) & 1) == 0)[:, None]
            if not CAUSAL:
                is_summarised &= (key < num_keys)[None, :]
            logits = tl.dot(mu_rows, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            weights = tl.where(is_summarised, tl.exp2(logits - mass[:, None]), 0.0)
            t = tl.dot(dkey_mean, tl.trans(k), input_precision="ieee")
            t = tl.dot(dvalue_mean, tl.trans(v), t, input_precision="ieee")
            dlogits = weights * (at_0[:, None] + t) * scale
            weights = weights.to(k.dtype)
            dk = tl.dot(tl.trans(dlogits.to(k.dtype)), mu_rows, dk, input_precision="ieee")
            dk = tl.dot(tl.trans(weights), dkey_mean, dk, input_precision="ieee")
            dv = tl.dot(tl.trans(weights), dvalue_mean, dv, input_precision="ieee")

    if is_last == 0:
        tl.store(far_dk + keys, dk)
        tl.store(far_dv + keys, dv)
    else:
        kv_head = (first_head + local_kv_head).to(tl.int64)
        token = tl.load(key_order + (kv_head * num_rows * KEY_CLUSTERS + cluster) * K + key).to(tl.int64)
        mask = (token >= 0)[:, None] & (d < D)[None, :]
        rows = (kv_head * num_tokens + token)[:, None] * D + d[None, :]
        dk += tl.load(dk_out + rows, mask=mask, other=0.0).to(tl.float32)
        dv += tl.load(dv_out + rows, mask=mask, other=0.0).to(tl.float32)
        tl.store(dk_out + rows, dk.to(dk_out.dtype.element_ty), mask=mask)
        tl.store(dv_out + rows, dv.to(dv_out.dtype.element_ty), mask=mask)


def key_gradients(
    mu: Tensor,
    clustered_k: Tensor,
    clustered_v: Tensor,
    clustered: ClusteredQueries,
    summary: Summaries,
    dmass_at_0: Tensor,
    lists: InvertedLists | None,
    far: tuple[Tensor, Tensor] | None,
    dk: Tensor,
    dv: Tensor,
    key_order: Tensor,
    layout: FarLayout,
    table: ChunkTable,
    group: Group,
    options: ResolvedOptions,
) -> None:
    """Gradients of far keys from the queries of a group of rows, added to dk and dv once the last group is done.

    Args:
        mu: dtype of k [B, H, C, chunk / query_cluster, D]. key_order: int32 [B, H_kv, C, chunk].
        clustered_k, clustered_v: [heads, C * chunk, padded D].
        summary, dmass_at_0: as `far_field_backward` leaves them, with dkbar and dvbar for kbar and vbar.
        lists: of this group; None if nothing is retrieved.
        far: float32 [heads, C * chunk, padded D] each, what groups of rows hand on; None if there is one group.
        dk, dv: [B, H_kv, N, D], contiguous: the near field's.
        layout: of summaries.
    """
    head_dim, num_rows = mu.shape[-1], table.start.shape[0]
    block_d = padded_head_dim(head_dim)
    tile = tile_of("key_gradients", clustered_k)
    tile["QUERIES"] = min(tile["QUERIES"], options.query_cluster)
    device = clustered_k.device
    if lists is not None:
        num_partials = -(-lists.owner.shape[0] // LONGEST_PIECE)
        shape = (num_partials, options.key_cluster, block_d)
        partial_dk, partial_dv = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        if num_partials > 0:
            muse_retrieved_partials[(num_partials,)](
                clustered_k,
                clustered_v,
                *clustered,
                *lists,
                table.length,
                partial_dk,
                partial_dv,
                lists.start.shape[0] - 1,
                num_rows * options.key_clusters,
                options.top_k,
                options.softmax_scale,
                BLOCK_D=block_d,
                Q=options.query_cluster,
                K=options.key_cluster,
                KEY_CLUSTERS=options.key_clusters,
                PIECE=LONGEST_PIECE,
                CAUSAL=options.causal,
                **{name: size for name, size in tile.items() if name not in ("A", "SUMMARY_STAGES")},
            )
        list_arguments = (lists.position, lists.start, partial_dk, partial_dv)
    else:
        list_arguments = (layout.offset, layout.num_far, dmass_at_0, dmass_at_0)
    muse_key_gradients[(num_rows * options.key_clusters, group.num_heads)](
        mu,
        clustered_k,
        clustered_v,
        *clustered,
        summary.kbar,
        summary.vbar,
        dmass_at_0,
        summary.log_mass,
        summary.retrieved,
        *list_arguments,
        *(far or (dmass_at_0, dmass_at_0)),
        dk,
        dv,
        key_order,
        *layout,
        *table[1:],
        group.rows.start,
        group.rows.stop,
        num_rows,
        group.heads.start,
        dk.shape[2],
        dmass_at_0.shape[1],
        options.top_k,
        int(group.is_first),
        int(group.is_last),
        options.softmax_scale,
        G=dmass_at_0.shape[0] // group.num_heads,
        D=head_dim,
        BLOCK_D=block_d,
        Q=options.query_cluster,
        K=options.key_cluster,
        QUERY_CLUSTERS=options.query_clusters,
        KEY_CLUSTERS=options.key_clusters,
        PER_SUMMARY=options.key_clusters_per_summary,
        PIECE=LONGEST_PIECE,
        CAUSAL=options.causal,
        HAS_RETRIEVED=lists is not None,
        **tile,
    )
