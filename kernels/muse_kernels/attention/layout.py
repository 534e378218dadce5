"""Where what a query cluster has for each of its far clusters lies in the workspace: scores, or summaries.

A row of the chunk table sees the clusters of its document's earlier chunks (bidirectional: of all its chunks, of which
the own one counts for nothing). Causal rows have only what they see: no triangle is stored empty.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
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


@triton.jit
def far_place(offset, first_row, row, query_cluster, num_far, local_head, capacity):
    """Where the entries of query clusters, by row and number in it, begin in a group's buffer [heads, capacity]."""
    in_group = tl.load(offset + row) - tl.load(offset + first_row) + query_cluster * num_far
    return in_group + local_head.to(tl.int64) * capacity


@triton.jit
def far_run(
    first_cluster,
    num_far,
    offset,
    first_row,
    end_row,
    local_head,
    capacity,
    QUERY_CLUSTERS: tl.constexpr,
    A: tl.constexpr,
    RUN: tl.constexpr,
):
    """What a program has to do that takes A query clusters and RUN clusters that some of them see.

    Returns:
        a, is_query_cluster, row [A]: the query clusters, counted from the first row of the table.
        row_first, row_far [A]: first cluster in sight, and how many; none where there is no query cluster.
        place [A]: where a cluster's entry lies, less the number of the cluster.
        start, stop: the run; empty where nobody sees any of it.
    """
    a = first_row * QUERY_CLUSTERS + tl.program_id(0) * A + tl.arange(0, A)
    is_query_cluster = a < end_row * QUERY_CLUSTERS
    row = tl.minimum(a // QUERY_CLUSTERS, end_row - 1)
    row_first = tl.load(first_cluster + row)
    row_far = tl.where(is_query_cluster, tl.load(num_far + row), 0)
    place = far_place(offset, first_row, row, a % QUERY_CLUSTERS, row_far, local_head, capacity) - row_first
    # Half of the largest integer, so that a tile without any far cluster does not overflow into one.
    start = tl.min(tl.where(row_far > 0, row_first, 1073741824)) + tl.program_id(1) * RUN
    stop = tl.minimum(tl.max(tl.where(row_far > 0, row_first + row_far, 0)), start + RUN)
    return a, is_query_cluster, row, row_first, row_far, place, start, stop
