"""`muse_attention`, the public function: documents, and the two custom operators with autograd between them.

The operators are opaque to torch.compile. Cluster orders, mu and R are outputs of the forward operator, so that the
backward pass uses the very clusters of the forward pass. Definition: docs/attention.md.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from muse_kernels.attention.checks import (
    HAS_TRITON,
    check_clusters,
    check_tensors,
    cluster_shapes,
    implementation_of,
    statistics_dtype,
)
from muse_kernels.attention.documents import document_clusters, document_spans, shifted
from muse_kernels.attention.options import (
    Clustering,
    Expansion,
    Implementation,
    MuseOptions,
    ResolvedOptions,
    Selection,
)
from muse_kernels.attention.reference import Merged, MuseClusters, exact_attention, exact_attention_backward
from muse_kernels.attention.reference_document import document_backward, document_forward

if HAS_TRITON:
    from muse_kernels.attention import streaming

_EXACT_BY_SPEED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def muse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 2048,
    query_cluster: int = 128,
    key_cluster: int = 64,
    summary_cluster: int | None = None,
    top_k: int = 12,
    candidates: int = 48,
    order: int = 1,
    selection: Selection = "peak_mass",
    expansion: Expansion = "centroid",
    query_clustering: Clustering = "semantic",
    key_clustering: Clustering = "semantic",
    exact_below: int | None = None,
    clusters: MuseClusters | None = None,
    workspace_mib: int = 1024,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multipole Semantic Attention: exact for near and for the most important far keys, summaries for all others.

    Args:
        q: [B, H, N, D], floating point, any strides. Under autocast, q, k and v are cast as SDPA casts them.
        k, v: [B, H_kv, N, D], H a multiple of H_kv; dtype and device as q.
        causal: a token attends to itself and earlier tokens; False: to every token of its document.
        softmax_scale: factor of q . k; None is 1 / sqrt(D).
        cu_seqlens: int32 [S + 1], first 0, last N, non-decreasing: documents that do not see each other, with B = 1.
            Repeated values are empty documents, so it may be padded by repeating N. Values are checked on a CPU only.
        chunk: tokens per chunk; the own chunk is attended exactly.
        query_cluster, key_cluster: tokens per cluster; chunk divided by either is a power of two.
        summary_cluster: keys behind one summary: key_cluster times a power of two; None is 8 times, at most the chunk.
        top_k: key clusters that every query cluster attends exactly; more than there are means all.
        order: 1 expands a far cluster's log-mass to first order around the query cluster, 0 keeps the constant.
        candidates: clusters that selection by "peak_mass" looks at key by key.
        selection: how the top_k are ranked: "peak_mass" by the share that all queries give to a cluster's largest key,
            among the candidates; "centroid" by what it weighs for their mean alone.
        expansion: expand around the query cluster's "centroid", or around "zero" (plain means of keys and values).
        query_clustering, key_clustering: "semantic" by recursive bisection, "spatial" contiguous runs.
        exact_below: documents of at most so many tokens are attended exactly; None is 2 * chunk with `cu_seqlens` and
            7 * chunk without: up to there exact attention is the faster.
        clusters: reuse these (from `muse_clusters`, of the same shapes and documents) and choose nothing.
        workspace_mib: bound on intermediate results, MiB; at least one query chunk is worked on at a time.
        return_lse: also return the log-sum-exp.
        implementation: "triton" (kernels; never falls back), "reference" (plain PyTorch: any device, dtype, sizes) or
            "auto": kernels on a GPU for what they accept, else plain PyTorch.
    Returns:
        out [B, H, N, D], dtype of q. With `return_lse` also lse [B, H, N], natural log, float32 (float64 for float64
        inputs), not differentiable.
    Raises:
        ValueError: an argument's shape, dtype, device or value is not accepted.
    Source: docs/attention.md; Mitchell and Kersting, "Multipole Semantic Attention", arXiv 2509.10406.
    """
    options = MuseOptions(
        causal=causal,
        softmax_scale=softmax_scale,
        chunk=chunk,
        query_cluster=query_cluster,
        key_cluster=key_cluster,
        summary_cluster=summary_cluster,
        top_k=top_k,
        candidates=candidates,
        order=order,
        selection=selection,
        expansion=expansion,
        query_clustering=query_clustering,
        key_clustering=key_clustering,
        exact_below=exact_below,
        workspace_mib=workspace_mib,
        implementation=implementation,
    )
    q, k, v = _as_autocast_has_it(q, k, v)
    check_tensors(q, k, v, cu_seqlens)
    resolved = _resolved(q, options, cu_seqlens)
    if not return_lse and clusters is None and cu_seqlens is None and _is_for_library(q, k, resolved):
        return _exact_by_library(q, k, v, resolved)
    out, lse, _ = _attend(q, k, v, cu_seqlens, resolved, clusters)
    return (out, lse.detach()) if return_lse else out


def _is_for_library(q: Tensor, k: Tensor, options: ResolvedOptions) -> bool:
    """Whether kernels would do nothing but call exact attention, in a form that PyTorch's own function is fast at.

    In float32 none of its fast kernels takes fewer key-value heads.
    """
    is_exact = q.shape[2] <= options.exact_below and options.implementation == "triton" and q.is_cuda
    return is_exact and (q.dtype != torch.float32 or q.shape[1] == k.shape[1])


def _exact_by_library(q: Tensor, k: Tensor, v: Tensor, options: ResolvedOptions) -> Tensor:
    with sdpa_kernel(_EXACT_BY_SPEED, set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=options.causal, scale=options.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.contiguous()


def muse_clusters(q: Tensor, k: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any) -> MuseClusters:
    """The clusters that `muse_attention` makes of these q and k: orders, expansion points, retrieved clusters.

    Args:
        q, k, cu_seqlens: as in `muse_attention`; values have no influence on clusters.
        options: those of `muse_attention`, the same for the same clusters.
    Returns:
        MuseClusters, to inspect or to pass as `clusters=`.
    Raises:
        ValueError: as `muse_attention`. TypeError: an option that does not exist.
    """
    with torch.no_grad():
        q, k, _ = _as_autocast_has_it(q, k, k)
        check_tensors(q, k, k, cu_seqlens)
        return _attend(q, k, k, cu_seqlens, _resolved(q, MuseOptions(**options), cu_seqlens), None)[2]


def _as_autocast_has_it(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as scaled_dot_product_attention would get them under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _resolved(q: Tensor, options: MuseOptions, cu_seqlens: Tensor | None) -> ResolvedOptions:
    resolved = options.resolved(q.shape[-1], has_documents=cu_seqlens is not None)
    return replace(resolved, implementation=implementation_of(q, resolved, cu_seqlens))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: ResolvedOptions, clusters: MuseClusters | None
) -> tuple[Tensor, Tensor, MuseClusters]:
    given: tuple[Tensor | None, ...] = (None, None, None, None)
    if clusters is not None:
        check_clusters(clusters, q, k, cu_seqlens, options)
        given = tuple(clusters)
    out, lse, *made = torch.ops.muse.attention_forward(q, k, v, cu_seqlens, *given, options.encoded())
    return out, lse, MuseClusters(*made)


# ------------------------------------------------------------------------------------------------------ operators


_CLUSTERS = "Tensor{0} query_order, Tensor{0} key_order, Tensor{0} mu, Tensor{0} selected"


def _on_its_device_without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inputs have their dtype by now; autocast must not lower the precision of the statistics inside."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        # Kernels start on the current device, which need not be that of the tensors.
        with torch.autocast(arguments[0].device.type, enabled=False), torch.cuda.device_of(arguments[0]):
            return function(*arguments)

    return wrapped


@torch.library.custom_op(
    "muse::attention_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, {_CLUSTERS.format('?')}, str options)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@_on_its_device_without_autocast
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *clusters_and_options: Any
) -> tuple[Tensor, ...]:
    """out, lse, then the fields of MuseClusters: those given, or chosen where None was given."""
    given, options = clusters_and_options[:4], ResolvedOptions.decoded(clusters_and_options[4])
    if options.implementation == "triton":
        fixed = None if given[0] is None else _within_bounds(MuseClusters(*given), q, options)
        out, lse, made = streaming.attention_forward(q, k, v, cu_seqlens, fixed, options)
        return out, lse, *made
    dtype = statistics_dtype(q)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:-1], dtype=dtype)
    if given[0] is None:
        shapes = cluster_shapes(q, k, cu_seqlens, options)
        made = MuseClusters(*(q.new_full(shape, 0 if x.is_floating_point else -1, dtype=x) for shape, x in shapes))
    else:
        made = MuseClusters(*(x.clone() for x in given))
    for document in document_spans(q.shape[2], cu_seqlens, options):
        tokens, rows = document.tokens, document.rows
        document_q, document_k, document_v = (x[:, :, tokens].to(dtype) for x in (q, k, v))
        if document.is_exact:
            document_q = document_q * options.softmax_scale
            document_out, document_lse = exact_attention(
                document_q, document_k, document_v, options.causal, options.workspace_mib
            )
        else:
            fixed = None if given[0] is None else document_clusters(made, document, options)
            document_out, document_lse, clusters = document_forward(
                document_q, document_k, document_v, options, fixed, mu_dtype=q.dtype
            )
            if fixed is None:
                made.query_order[:, :, rows] = shifted(clusters.query_order, tokens.start)
                made.key_order[:, :, rows] = shifted(clusters.key_order, tokens.start)
                made.mu[:, :, rows] = clusters.mu
                made.selected[:, :, rows] = shifted(clusters.selected, rows.start * options.key_clusters)
        out[:, :, tokens], lse[:, :, tokens] = document_out, document_lse
    return out, lse, *made


def _within_bounds(clusters: MuseClusters, q: Tensor, options: ResolvedOptions) -> MuseClusters:
    """A copy whose numbers lead to no address outside, whatever they are: kernels trust them."""
    key_clusters = clusters.query_order.shape[2] * options.key_clusters
    return MuseClusters(
        clusters.query_order.clamp(-1, q.shape[2] - 1),
        clusters.key_order.clamp(-1, q.shape[2] - 1),
        clusters.mu.clone(),
        clusters.selected.clamp(-1, key_clusters - 1),
    )


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *clusters_and_options: Any) -> tuple[Tensor, ...]:
    shapes = cluster_shapes(q, k, cu_seqlens, ResolvedOptions.decoded(clusters_and_options[4]))
    lse = q.new_empty(q.shape[:-1], dtype=statistics_dtype(q))
    made = (q.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, *made


@torch.library.custom_op(
    "muse::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens, "
    f"{_CLUSTERS.format('')}, str options) -> (Tensor, Tensor, Tensor)",
)
@_on_its_device_without_autocast
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    *clusters_and_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. `out` and `lse` may be a merged result over more keys than k."""
    clusters, options = (
        MuseClusters(*clusters_and_options[:4]),
        ResolvedOptions.decoded(clusters_and_options[4]),
    )
    if options.implementation == "triton":
        return streaming.attention_backward(dout, q, k, v, out, lse, cu_seqlens, clusters, options)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for document in document_spans(q.shape[2], cu_seqlens, options):
        tokens = document.tokens
        merged = Merged(*(x[:, :, tokens].to(lse.dtype) for x in (out, lse, dout)))
        document_q, document_k, document_v = (x[:, :, tokens].to(lse.dtype) for x in (q, k, v))
        if document.is_exact:
            gradients = exact_attention_backward(
                document_q * options.softmax_scale,
                document_k,
                document_v,
                merged,
                options.causal,
                options.workspace_mib,
            )
            gradients = (gradients[0] * options.softmax_scale, *gradients[1:])
        else:
            own = document_clusters(clusters, document, options)
            gradients = document_backward(document_q, document_k, document_v, merged, own, options)
        dq[:, :, tokens], dk[:, :, tokens], dv[:, :, tokens] = gradients
    return dq, dk, dv


@attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, *_ = inputs
    ctx.set_materialize_grads(False)  # zeros for lse and clusters, which have no gradients
    ctx.save_for_backward(q, k, v, *output[:2], cu_seqlens, *output[2:])
    ctx.options = inputs[8]


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    q, k, v, out, lse, cu_seqlens, *clusters = ctx.saved_tensors
    gradients = torch.ops.muse.attention_backward(dout, q, k, v, out, lse, cu_seqlens, *clusters, ctx.options)
    return *gradients, *(None for _ in range(6))


attention_forward.register_autograd(_backward, setup_context=_setup_context)
