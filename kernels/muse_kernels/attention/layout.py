"""Where what a query cluster has for each of its far clusters lies in the workspace: scores, or summaries.

A row of the chunk table sees the clusters of its document's earlier chunks (bidirectional: of all its chunks, of which
the own one counts for nothing). Causal rows have only what they see: no triangle is stored empty.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from muse_kernels.attention.chunks import ChunkTable
from muse_kernels.attention.options import ResolvedOptions


class FarLayout(NamedTuple):
    """One entry per row of the chunk table, [C], on the device.

    Query cluster i of row r sees clusters first_cluster[r] .. + num_far[r]. Its entry for the first of them lies at
    offset[r] + i * num_far[r], counted from the first row of the group of rows at hand.
    """

    first_cluster: Tensor
    """int32: number of the document's first cluster."""
    num_far: Tensor
    """int32: clusters in sight."""
    offset: Tensor
    """int64: where the row's entries begin, counted from the first row."""


def far_layout(table: ChunkTable, options: ResolvedOptions, clusters_per_chunk: int) -> FarLayout:
    """The layout of key clusters, or of summaries: `clusters_per_chunk` says how many of them a chunk has."""
    rows = torch.arange(table.first.shape[0], dtype=torch.int32, device=table.first.device)
    num_far = ((rows if options.causal else table.end) - table.first) * clusters_per_chunk
    sizes = num_far.long() * options.query_clusters
    return FarLayout(table.first * clusters_per_chunk, num_far, torch.cumsum(sizes, 0) - sizes)


def far_chunks_of_row(row: int, num_tokens: int, options: ResolvedOptions) -> int:
    """The most far chunks a row of the chunk table can see: known without looking at documents."""
    chunks = -(-num_tokens // options.chunk)
    return min(row, chunks - 1) if options.causal else chunks
