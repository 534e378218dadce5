"""Documents one after the other, as plain PyTorch works on them: their tokens, and their rows of MuseClusters."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention.chunks import document_bounds
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.reference import MuseClusters


class DocumentSpan(NamedTuple):
    """Where a document lies."""

    tokens: slice
    rows: slice
    """Its rows in the chunk table of MuseClusters; none if it is exact."""
    is_exact: bool


def document_spans(num_tokens: int, cu_seqlens: Tensor | None, options: ResolvedOptions) -> Iterator[DocumentSpan]:
    """The documents that are not empty. Reads `cu_seqlens` on the host."""
    # A bad cu_seqlens on a GPU, whose values nobody checked, must not lead out of bounds.
    ends = [num_tokens] if cu_seqlens is None else document_bounds(num_tokens, cu_seqlens)[1:].tolist()
    start, row = 0, 0
    for end in ends:
        if end > start:
            is_exact = end - start <= options.exact_below
            next_row = row if is_exact else row - (start - end) // options.chunk
            yield DocumentSpan(slice(start, end), slice(row, next_row), is_exact)
            start, row = end, next_row


def shifted(order: Tensor, offset: int) -> Tensor:
    """Indices moved by an offset; -1 stays."""
    return torch.where(order < 0, order, order + offset)


def document_clusters(clusters: MuseClusters, document: DocumentSpan, options: ResolvedOptions) -> MuseClusters:
    """One document's rows of the chunk table, counted from its own start."""
    query_order, key_order, mu, selected = (x[:, :, document.rows] for x in clusters)
    return MuseClusters(
        shifted(query_order, -document.tokens.start),
        shifted(key_order, -document.tokens.start),
        mu,
        shifted(selected, -document.rows.start * options.key_clusters),
    )
