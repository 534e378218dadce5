"""Multipole Semantic Attention as a strategy: the reason for this project."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from muse_kernels import muse_attention
from muse_kernels.attention.options import Clustering, Expansion, Implementation, MuseOptions, Selection
from muse_kernels.cost import muse_pairs
from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.packed import flatten_batch, unflatten_batch
from muse_lightning.errors import UserError


class Muse(AttentionStrategy):
    """Multipole Semantic Attention (arXiv 2509.10406; docs/attention.md): sub-quadratic, trained, one line from Dense.

    Queries and keys are clustered separately. A token attends exactly to its own chunk and to the `top_k` key clusters
    that matter most to its query cluster; all other far keys it sees through summaries.

    Args:
        layer_idx: number of the layer, from 0.
        chunk: tokens per chunk. The own chunk is exact; larger is more exact and dearer.
        query_cluster: tokens per query cluster; smaller is more exact and dearer.
        key_cluster: tokens per key cluster; smaller is more exact and dearer.
        summary_cluster: tokens behind one summary of far keys, key_cluster times a power of two; null is 8 times, at
            most the chunk. Larger is cheaper, and little less exact.
        top_k: key clusters that each query cluster attends exactly. Larger is more exact; one more is `key_cluster`
            keys more for every token.
        order: 1 (dipole) or 0 (monopole) expansion of a far cluster's log-mass.
        candidates: key clusters that selection by "peak_mass" looks at key by key.
        selection: rank clusters by the "peak_mass" of their largest keys, or by their mass at the "centroid" alone.
        expansion: expand around the query cluster's "centroid" or around "zero" (plain means).
        query_clustering: "semantic" or "spatial" (contiguous runs).
        key_clustering: "semantic" or "spatial" (contiguous runs).
        exact_below: documents of at most so many tokens are attended exactly; null is 2 * chunk with document_mask and
            7 * chunk without: up to there exact attention is the faster.
        workspace_mib: bound on intermediate results, MiB.
        implementation: "triton" (kernels), "reference" (plain PyTorch), or "auto": kernels wherever they can be used.
    Raises:
        UserError: a value that `muse_attention` does not accept.
    """

    heads_are_alike = True

    def __init__(
        self,
        layer_idx: int,
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
        workspace_mib: int = 1024,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__(layer_idx)
        self.options: dict[str, Any] = {
            "chunk": chunk,
            "query_cluster": query_cluster,
            "key_cluster": key_cluster,
            "summary_cluster": summary_cluster,
            "top_k": top_k,
            "candidates": candidates,
            "order": order,
            "selection": selection,
            "expansion": expansion,
            "query_clustering": query_clustering,
            "key_clustering": key_clustering,
            "exact_below": exact_below,
            "workspace_mib": workspace_mib,
            "implementation": implementation,
        }
        try:
            MuseOptions(**self.options)
        except ValueError as error:
            raise UserError(f"{type(self).__name__}: {error}") from None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        batch_size = q.shape[0]
        if cu_seqlens is not None:
            q, k, v = (flatten_batch(x) for x in (q, k, v))
        out = cast(Tensor, muse_attention(q, k, v, softmax_scale=softmax_scale, cu_seqlens=cu_seqlens, **self.options))
        return out if cu_seqlens is None else unflatten_batch(out, batch_size)

    def check(self, *, seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().check(seq_len=seq_len, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        exact_below = MuseOptions(**self.options).resolved(head_dim).exact_below
        if seq_len <= exact_below:
            warnings.warn(
                f"{type(self).__name__} attends rows without documents exactly at this context: data.seq_len={seq_len} "
                f"is at most exact_below={exact_below} (default 7 * chunk); use a longer context or a smaller chunk",
                stacklevel=2,
            )

    def pairs(self, lengths: Sequence[int], *, has_documents: bool = False) -> float:
        options = MuseOptions(**self.options)
        return sum(muse_pairs(length, options, has_documents=has_documents).training for length in lengths)

    def extra_repr(self) -> str:
        """The two options that decide cost and error most, and the arguments that are not left at their defaults."""
        accepted = inspect.signature(type(self)).parameters
        given = [name for name, value in self.options.items() if name in accepted and value != accepted[name].default]
        return ", ".join(f"{name}={self.options[name]}" for name in dict.fromkeys(["chunk", "top_k", *given]))
