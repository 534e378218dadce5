"""Leaks made on purpose, in steps of the operator, of plain PyTorch and of kernels alike: what the test must find."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from muse_kernels.attention import reference, reference_document
from muse_kernels.attention import streaming as kernels
from muse_kernels.attention.reference_document import Document, Far, QueryGroup


def following(x: Tensor, chunk: int, by: int = -1) -> Tensor:
    """What stands at the next token of the same chunk, in the place of every token; the last one gets the first's.

    Args:
        x: [B, H, N, D], N a multiple of the chunk.
    """
    return x.unflatten(2, (-1, chunk)).roll(by, 3).flatten(2, 3)


# ---------------------------------------------------- the near field, its mask shifted by one in one head


@contextmanager
def shifted_near_mask() -> Iterator[None]:
    """In the first head, keys and values of the near field stand one place too early, below the same mask."""

    def first_head(x: Tensor, chunk: int, by: int = -1) -> Tensor:
        return torch.cat((following(x[:, :1], chunk, by), x[:, 1:]), 1)

    def forward(near_field: Callable[..., Any]) -> Callable[..., Any]:
        def leaking(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
            chunk = others[-1].chunk
            return near_field(q, first_head(k, chunk), first_head(v, chunk), *others)

        return leaking

    def backward(near_field_backward: Callable[..., Any], first: int) -> Callable[..., Any]:
        def leaking(*inputs: Any) -> Any:
            before, (q, k, v), others = inputs[:first], inputs[first : first + 3], inputs[first + 3 :]
            chunk = others[-1].chunk
            dq, dk, dv = near_field_backward(*before, q, first_head(k, chunk), first_head(v, chunk), *others)
            return dq, first_head(dk, chunk, 1), first_head(dv, chunk, 1)

        return leaking

    with (
        patch.object(reference, "near_field", forward(reference.near_field)),
        patch.object(reference, "near_field_backward", backward(reference.near_field_backward, 0)),
        patch.object(kernels, "near_field", forward(kernels.near_field)),
        patch.object(kernels, "near_field_backward", backward(kernels.near_field_backward, 1)),
    ):
        yield


# --------------------------------------------------------------------------- summary values with later tokens in them


def _mean_of_following(v: Tensor, query_order: Tensor, query_cluster: int, chunk: int) -> Tensor:
    """Mean of the values at the tokens after a query cluster's own: [B, H, C, chunk / query_cluster, D]."""
    values = following(v, chunk).repeat_interleave(query_order.shape[1] // v.shape[1], 1)
    return reference.gather_tokens(values, query_order).unflatten(3, (-1, query_cluster)).mean(4)


def _reference_far(far: Callable[[Document, QueryGroup], Far]) -> Callable[[Document, QueryGroup], Far]:
    def leaking(self: Document, group: QueryGroup) -> Far:
        honest = far(self, group)
        v = reference.scatter_tokens(self.v.flatten(2, 3), self.clusters.key_order.flatten(2), self.num_tokens)
        order = self.clusters.query_order
        leak = _mean_of_following(v, order, self.options.query_cluster, self.options.chunk)[:, :, group.chunks]
        leak = self.grouped(leak.flatten(2, 3)).unsqueeze(3)
        return honest._replace(summary=honest.summary._replace(vbar=honest.summary.vbar + leak))

    return leaking


class _KernelSummaries:
    """Adds to the summaries that a kernel is about to read, in their workspace; knows the values from the near field,
    which is called before."""

    def __init__(self) -> None:
        self.v = torch.empty(0)

    def noting(self, near_field: Callable[..., Any], place: int) -> Callable[..., Any]:
        """The near field; `place` is that of v among its arguments."""

        def wrapped(*inputs: Any) -> Any:
            self.v = inputs[place]
            return near_field(*inputs)

        return wrapped

    def leaking(self, far_field: Callable[..., Any], order: int, summary: int, layout: int) -> Callable[..., Any]:
        """The far field; the places of its arguments are given."""

        def wrapped(*inputs: Any) -> Any:
            self.add(inputs[order], inputs[summary], *inputs[layout:])
            return far_field(*inputs)

        return wrapped

    def add(self, query_order: Tensor, summary: Any, layout: Any, table: Any, group: Any, options: Any) -> None:
        leak = _mean_of_following(self.v, query_order, options.query_cluster, options.chunk).flatten(0, 1)
        heads_per_kv_head = query_order.shape[1] // self.v.shape[1]
        heads = slice(group.heads.start * heads_per_kv_head, group.heads.stop * heads_per_kv_head)
        leak = leak[heads, group.rows].flatten(1, 2)  # [heads, query clusters of the group, D]
        num_far = layout.num_far[group.rows].repeat_interleave(options.query_clusters)
        clusters = torch.arange(len(num_far), device=num_far.device).repeat_interleave(num_far)
        summary.vbar[:, : len(clusters), : leak.shape[-1]] += leak[:, clusters]


@contextmanager
def later_summary_values() -> Iterator[None]:
    """Every summary's value has the mean of the values that follow the query cluster's own tokens added."""
    leak = _KernelSummaries()
    with (
        patch.object(reference_document.Document, "far", _reference_far(Document.far)),
        patch.object(kernels, "near_field", leak.noting(kernels.near_field, 2)),
        patch.object(kernels, "near_field_backward", leak.noting(kernels.near_field_backward, 3)),
        patch.object(kernels, "far_field", leak.leaking(kernels.far_field, 3, 5, 8)),
        patch.object(kernels, "far_field_backward", leak.leaking(kernels.far_field_backward, 5, 8, 13)),
    ):
        yield


HONEST = nullcontext
CONTROLS = {"near mask shifted": shifted_near_mask, "later summary values": later_summary_values}
