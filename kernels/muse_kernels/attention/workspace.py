"""How work is cut into groups that fit into the workspace, and the buffers of a group.

Heads are worked on in groups, as many as the workspace holds; where it cannot hold one key-value head with all its
query heads, rows of the chunk table are taken in groups too, since the summaries of a row are used by that row alone.
Nothing here reads device memory on the host: sizes follow from shapes and options.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from muse_kernels.attention.chunks import Group
from muse_kernels.attention.common import padded_head_dim
from muse_kernels.attention.key_gradients import LONGEST_PIECE, ClusteredQueries
from muse_kernels.attention.layout import far_chunks_of_row
from muse_kernels.attention.options import ResolvedOptions
from muse_kernels.attention.summaries import Summaries


class Workspace:
    """Sizes and buffers of one forward or backward pass.

    Args:
        q: [B, H, N, D]. k: [B, H_kv, N, D].
        row_count: rows of the chunk table.
    """

    def __init__(self, q: Tensor, k: Tensor, row_count: int, options: ResolvedOptions, *, backward: bool) -> None:
        self.options, self.row_count, self.backward = options, row_count, backward
        self.dtype, self.device = q.dtype, q.device
        self.num_kv_heads, self.heads_per_kv_head = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
        self.head_dim = padded_head_dim(q.shape[-1])
        self.far_chunks = [far_chunks_of_row(row, q.shape[2], options) for row in range(row_count)]

    def groups(self) -> Iterator[Group]:
        """Groups in the order in which gradients of keys can be added up; none where no row has far keys."""
        if sum(self.far_chunks) == 0 or self.num_kv_heads == 0:
            return
        budget = self.options.workspace_mib * 2**20
        keys = 2 * self.row_count * self.options.chunk * self.head_dim  # numbers: k and v of one head
        per_head = keys * self.dtype.itemsize
        row_bytes = [self._bytes_per_row(far_chunks) for far_chunks in self.far_chunks]
        heads_at_once = min(self.num_kv_heads, budget // (per_head + sum(row_bytes)))
        if heads_at_once > 0:
            parts = -(-self.num_kv_heads // heads_at_once)
            heads_at_once = -(-self.num_kv_heads // parts)  # groups of about equal size
            row_groups = [slice(0, self.row_count)]
        else:
            heads_at_once = 1
            if self.backward:
                per_head += keys * 4  # sums of their gradients, float32
            row_groups = list(_split(row_bytes, max(budget - per_head, budget // 2)))
        for start in range(0, self.num_kv_heads, heads_at_once):
            heads = slice(start, min(start + heads_at_once, self.num_kv_heads))
            for rows in row_groups:
                far_chunks = sum(self.far_chunks[rows])
                yield Group(heads, rows, far_chunks, rows.start == 0, rows.stop == self.row_count)

    def largest_group(self) -> int:
        """Bytes that a group takes at most: no more than `workspace_mib`, unless one head needs it."""
        sizes = [0]
        for group in self.groups():
            numbers = 2 * self.row_count * self.options.chunk * self.head_dim  # k and v of one head
            is_split = not (group.is_first and group.is_last)
            keys = numbers * (self.dtype.itemsize + (4 if self.backward and is_split else 0))
            sizes.append(group.num_heads * (keys + sum(map(self._bytes_per_row, self.far_chunks[group.rows]))))
        return max(sizes)

    def _bytes_per_row(self, far_chunks: int) -> int:
        """What a row adds: summaries and what lies beside them; forward, scores; backward, its queries."""
        options = self.options
        beside = 16 if self.backward else 12
        per_query_cluster = far_chunks * options.summaries * (2 * self.head_dim * self.dtype.itemsize + beside)
        if not self.backward:
            per_query_cluster += far_chunks * options.key_clusters * 4
        per_query_head = options.query_clusters * per_query_cluster
        if self.backward:
            per_query_head += options.chunk * (2 * self.head_dim * self.dtype.itemsize + 8)
            # For each pair of a query cluster and a key cluster that it retrieves: sorting, partial results.
            per_pair = 40 + 8 * options.key_cluster * self.head_dim // LONGEST_PIECE
            per_query_head += options.query_clusters * options.top_k * per_pair
        return per_query_head * self.heads_per_kv_head

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised buffer."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def summaries(self, group: Group) -> Summaries:
        """Buffers for the summaries of a group."""
        shape = self._far_shape(group, self.options.summaries)
        return Summaries(
            kbar=self.empty(*shape, self.head_dim),
            vbar=self.empty(*shape, self.head_dim),
            bias=self.empty(*shape, dtype=torch.float32),
            log_mass=self.empty(*shape, dtype=torch.float32),
            retrieved=self.empty(*shape, dtype=torch.int32),
        )

    def scores(self, group: Group) -> Tensor:
        """A buffer for the scores of a group's far key clusters."""
        return self.empty(*self._far_shape(group, self.options.key_clusters), dtype=torch.float32)

    def _far_shape(self, group: Group, per_chunk: int) -> tuple[int, int]:
        """Query heads, and room for what every query cluster has `per_chunk` of for each far chunk."""
        heads = group.num_heads * self.heads_per_kv_head
        return heads, self.options.query_clusters * group.far_chunks * per_chunk

    def keys(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers for keys and values in cluster order and the clusters' spread."""
        heads = group.num_heads
        shape = (heads, self.row_count * self.options.chunk, self.head_dim)
        spread = self.empty(heads, self.row_count * self.options.key_clusters, dtype=torch.float32)
        return self.empty(*shape), self.empty(*shape), spread

    def queries(self, group: Group) -> ClusteredQueries:
        """Buffers in query-cluster order for q, dout, lse and delta of a group."""
        heads = group.num_heads * self.heads_per_kv_head
        places = group.num_rows * self.options.chunk
        return ClusteredQueries(
            self.empty(heads, places, self.head_dim),
            self.empty(heads, places, self.head_dim),
            self.empty(heads, places, dtype=torch.float32),
            self.empty(heads, places, dtype=torch.float32),
        )

    def key_sums(self, group: Group) -> tuple[Tensor, Tensor]:
        """Buffers for the sums of dk and dv over groups of rows."""
        shape = (group.num_heads, self.row_count * self.options.chunk, self.head_dim)
        return self.empty(*shape, dtype=torch.float32), self.empty(*shape, dtype=torch.float32)


def _split(sizes: list[int], budget: int) -> Iterator[slice]:
    """Consecutive ranges whose sizes add up to at most `budget`, or of one item."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > budget:
            yield slice(start, index)
            start, total = index, 0
        total += size
    yield slice(start, len(sizes))
