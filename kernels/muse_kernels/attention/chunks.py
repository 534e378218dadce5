"""Which tokens each row of the chunk table covers, made on the device from the documents' boundaries.

Documents of at most `exact_below` tokens have no rows. A longer one of n tokens has ceil(n / chunk) consecutive rows,
in order; rows that no document takes come last. The number of rows follows from shapes and options alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention.options import ResolvedOptions


class ChunkTable(NamedTuple):
    """One entry per row, int32 [C], on the device of the inputs."""

    start: Tensor
    """First token of the chunk; the number of tokens for an unused row."""
    length: Tensor
    """Tokens in the chunk; 0 for an unused row."""
    first: Tensor
    """First row of the chunk's document; the row itself for an unused row."""
    end: Tensor
    """One past the last row of the document; the row itself for an unused row."""


class Group(NamedTuple):
    """Some rows of the table for some heads: as much work as the workspace holds."""

    heads: slice
    """Key-value heads, counted over batch and heads together."""
    rows: slice
    far_chunks: int
    """Far chunks that the rows may see, added up."""
    is_first: bool
    """The first rows of these heads."""
    is_last: bool

    @property
    def num_heads(self) -> int:
        """Key-value heads."""
        return self.heads.stop - self.heads.start

    @property
    def num_rows(self) -> int:
        """Rows."""
        return self.rows.stop - self.rows.start


def num_rows(num_tokens: int, num_documents: int | None, options: ResolvedOptions) -> int:
    """Rows of the chunk table; `num_documents` is None without `cu_seqlens`."""
    longest = num_tokens // (options.exact_below + 1)  # documents that can be longer than exact_below
    if num_documents is None:
        return -(-num_tokens // options.chunk) if longest > 0 else 0
    return num_tokens // options.chunk + min(num_documents, longest)


def document_bounds(num_tokens: int, cu_seqlens: Tensor) -> Tensor:
    """`cu_seqlens`, rising from 0 to the number of tokens whatever its values are: every token has one document."""
    bounds = cu_seqlens.clamp(0, num_tokens).cummax(0).values
    # Filled: an assignment would copy a number from the host, which waits for the device.
    bounds[:1].fill_(0)
    bounds[-1:].fill_(num_tokens)
    return bounds


def chunk_table(
    num_tokens: int, cu_seqlens: Tensor | None, options: ResolvedOptions, device: torch.device
) -> ChunkTable:
    """The table of a row of tokens, or of its documents int32 [S + 1]; nothing is read on the host."""
    rows = num_rows(num_tokens, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, options)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    if cu_seqlens is None:
        start = row * options.chunk
        length = (num_tokens - start).clamp(max=options.chunk)
        return ChunkTable(start, length, torch.zeros_like(row), torch.full_like(row, rows))
    bounds = document_bounds(num_tokens, cu_seqlens)
    lengths = bounds.diff()
    rows_of_document = torch.where(lengths > options.exact_below, -(-lengths // options.chunk), 0)
    end_row = rows_of_document.cumsum(0, dtype=torch.int32)
    document = torch.searchsorted(end_row, row, right=True, out_int32=True)
    is_used = document < lengths.shape[0]
    document = document.clamp(max=lengths.shape[0] - 1)
    end = torch.where(is_used, end_row[document], row)
    first = torch.where(is_used, end - rows_of_document[document], row)
    start = torch.where(is_used, bounds[document] + (row - first) * options.chunk, num_tokens)
    length = torch.where(is_used, (bounds[document + 1] - start).clamp(max=options.chunk), 0)
    return ChunkTable(start, length, first, end)
