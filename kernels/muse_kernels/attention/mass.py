"""Where a query's attention goes: the share of its softmax mass in the own chunk, in retrieved keys, in summaries.

    near = sum_own exp(s_j) / Z,  retrieved = sum_retrieved exp(s_j) / Z,  summaries = sum exp(A of summaries) / Z

with s_j the scaled logits, A a summary's expanded log-mass at the query (docs/attention.md, "Definition") and Z the sum
of all three. In plain PyTorch, on any device; for measurements, not for training.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention import reference as step
from muse_kernels.attention.documents import document_clusters, document_spans
from muse_kernels.attention.op import muse_clusters
from muse_kernels.attention.options import MuseOptions, ResolvedOptions
from muse_kernels.attention.reference_document import Document


class MuseMass(NamedTuple):
    """Shares of each query's softmax mass, [B, H, N], float32 (float64 for float64); they add up to 1."""

    near: Tensor
    """Keys of the own chunk; all of it in a document that is attended exactly."""
    retrieved: Tensor
    """Keys of far clusters that are attended exactly."""
    summaries: Tensor
    """Everything else."""


@torch.no_grad()
def muse_mass(q: Tensor, k: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any) -> MuseMass:
    """Shares of softmax mass that `muse_attention` finds near, in retrieved keys and in summaries.

    Args:
        q, k, cu_seqlens, options: as for `muse_clusters`.
    Raises:
        ValueError: as `muse_attention`. TypeError: an option that does not exist.
    """
    clusters = muse_clusters(q, k, cu_seqlens=cu_seqlens, **options)
    resolved = MuseOptions(**options).resolved(q.shape[-1], has_documents=cu_seqlens is not None)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    near = q.new_ones(q.shape[:-1], dtype=dtype)
    retrieved, summaries = torch.zeros_like(near), torch.zeros_like(near)
    for span in document_spans(q.shape[2], cu_seqlens, resolved):
        if span.is_exact:
            continue
        own_q, own_k = (x[:, :, span.tokens].to(dtype) for x in (q, k))
        of_document = _document_mass(own_q, own_k, document_clusters(clusters, span, resolved), resolved)
        for total, part in zip((near, retrieved, summaries), of_document, strict=True):
            total[:, :, span.tokens] = part
    return MuseMass(near, retrieved, summaries)


def _document_mass(q: Tensor, k: Tensor, clusters: step.MuseClusters, options: ResolvedOptions) -> MuseMass:
    """Shares of one document: q [B, H, N, D], k [B, T, N, D], float32 or float64."""
    document = Document(q * options.softmax_scale, k, k, clusters, options)
    _, near_lse = step.near_field(document.q, k, k, options)
    near = torch.ones_like(near_lse)
    retrieved, summaries = torch.zeros_like(near), torch.zeros_like(near)
    for group in document.groups():
        keys = document.far(group).keys
        logs = (
            document.queries(near_lse, group.chunks),
            keys.retrieved_logits.logsumexp(-1),
            keys.summary_logits.logsumexp(-1),
        )
        shares = torch.stack(logs, dim=-1).softmax(-1)  # [B, T, A, S, 3]
        of_tokens = document.tokens(shares, group).unbind(-1)
        for total, part in zip((near, retrieved, summaries), of_tokens, strict=True):
            total[:, :, group.tokens] = part
    return MuseMass(near, retrieved, summaries)
