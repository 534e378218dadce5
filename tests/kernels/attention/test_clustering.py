"""Bisection and means as Triton kernels, against their definition in reference.py."""

import math

import pytest
import torch
from torch import Tensor

from muse_kernels.attention import clustering
from muse_kernels.attention import reference as step
from muse_kernels.attention.chunks import ChunkTable
from muse_kernels.attention.options import Clustering, MuseOptions

QUALITY = 1.02
"""Spread within the kernel's clusters over that within the reference's: sums in another order move a token across a
median now and then."""


def table_of(chunks: list[tuple[int, int]], num_tokens: int, device: torch.device, unused: int = 0) -> ChunkTable:
    """Rows (start, length), then unused ones. Clusters don't depend on which rows make a document."""
    rows = [*chunks, *((num_tokens, 0) for _ in range(unused))]
    start, length = (torch.tensor([row[i] for row in rows], dtype=torch.int32, device=device) for i in range(2))
    place = torch.arange(len(rows), dtype=torch.int32, device=device)
    return ChunkTable(start, length, place, place)


def order_of(x: Tensor, table: ChunkTable, chunk: int, cluster: int) -> Tensor:
    """Bisection of one tensor alone."""
    return clustering.bisection_orders([(x, cluster)], table, chunk)[0]


def chunks_of(num_tokens: int, chunk: int, start: int = 0) -> list[tuple[int, int]]:
    """The rows of one document."""
    return [(start + i, min(chunk, num_tokens - i)) for i in range(0, num_tokens, chunk)]


def tokens(*shape: int, device: torch.device, mean: float = 0.3) -> Tensor:
    """Rows with a few directions of large variance and a mean; the larger it is, the fewer digits are left for the
    covariance: at 0.3 no token is so near a median that it moves."""
    head_dim = shape[-1]
    scale = 1.0 / torch.arange(1, head_dim + 1)
    rotation = torch.linalg.qr(torch.randn(head_dim, head_dim)).Q
    return ((torch.randn(shape) * scale) @ rotation + mean * torch.randn(head_dim)).to(device)


def spread(x: Tensor, order: Tensor, cluster: int) -> Tensor:
    """Mean squared distance of a member to its cluster's mean."""
    members = step.gather_tokens(x.float(), order).unflatten(-2, (-1, cluster))
    is_member = (order >= 0).unflatten(-1, (-1, cluster)).unsqueeze(-1)
    mean = step.cluster_means(x.float(), order, cluster)
    return ((members - mean.unsqueeze(-2)).square() * is_member).sum() / is_member.sum()


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize(("chunk", "cluster"), [(256, 16), (128, 64)])
def test_orders_are_those_of_the_reference(chunk: int, cluster: int, head_dim: int, device: torch.device) -> None:
    num_tokens = 2 * chunk
    x = tokens(1, 2, num_tokens, head_dim, device=device)
    order = order_of(x, table_of(chunks_of(num_tokens, chunk), num_tokens, device), chunk, cluster)
    assert order.dtype == torch.int32
    assert torch.equal(order, step.bisection_order(x, chunk, cluster))


@pytest.mark.parametrize(("query_cluster", "key_cluster"), [(64, 16), (16, 64), (32, 32), (256, 64), (64, 256)])
def test_queries_and_keys_are_split_together(query_cluster: int, key_cluster: int, device: torch.device) -> None:
    q, k = tokens(2, 3, 300, 16, device=device), tokens(2, 300, 2, 16, device=device).transpose(1, 2)
    table = table_of(chunks_of(300, 256), 300, device)
    orders = clustering.bisection_orders([(q, query_cluster), (k, key_cluster)], table, 256)
    assert torch.equal(orders[0], step.bisection_order(q, 256, query_cluster))
    assert torch.equal(orders[1], step.bisection_order(k, 256, key_cluster))


@pytest.mark.parametrize("query_clustering", ["semantic", "spatial"])
@pytest.mark.parametrize("key_clustering", ["semantic", "spatial"])
def test_either_may_be_contiguous(
    query_clustering: Clustering, key_clustering: Clustering, device: torch.device
) -> None:
    q, k = tokens(1, 4, 100, 16, device=device), tokens(1, 2, 100, 16, device=device)
    table = table_of(chunks_of(100, 64), 100, device)
    options = MuseOptions(
        chunk=64,
        query_cluster=32,
        key_cluster=16,
        query_clustering=query_clustering,
        key_clustering=key_clustering,
    ).resolved(16)
    orders = clustering.cluster_orders(q, k, table, options)
    assert torch.equal(orders[0], step.cluster_order(q, 64, 32, query_clustering))
    assert torch.equal(orders[1], step.cluster_order(k, 64, 16, key_clustering))


@pytest.mark.parametrize("length", [1, 16, 17, 64, 65, 127, 128])
def test_a_partial_chunk_fills_its_clusters_from_the_first(length: int, device: torch.device) -> None:
    num_tokens = 128 + length
    x = tokens(1, 2, num_tokens, 16, device=device)
    order = order_of(x, table_of(chunks_of(num_tokens, 128), num_tokens, device), 128, 16)
    assert torch.equal(order, step.bisection_order(x, 128, 16))


def test_chunks_of_documents(device: torch.device) -> None:
    """A document that is exact lies between two others, and rows are left over."""
    documents = [(0, 150), (170, 64), (234, 70)]
    num_tokens = 304
    x = tokens(1, 2, num_tokens, 16, device=device)
    rows = [row for start, length in documents for row in chunks_of(length, 64, start)]
    order = order_of(x, table_of(rows, num_tokens, device, unused=2), 64, 16)
    apart = [step.bisection_order(x[:, :, start : start + length], 64, 16) for start, length in documents]
    shifted = [torch.where(y < 0, y, y + start) for y, (start, _) in zip(apart, documents, strict=True)]
    assert torch.equal(order[:, :, : len(rows)], torch.cat(shifted, dim=2))
    assert (order[:, :, len(rows) :] == -1).all()


@pytest.mark.parametrize("layout", ["heads inside tokens", "every second element", "expanded batch"])
def test_strides_do_not_matter(layout: str, device: torch.device) -> None:
    x = tokens(2, 3, 128, 32, device=device)
    if layout == "heads inside tokens":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "every second element":
        x = x[..., ::2]
    else:
        x = x[:1].expand(2, -1, -1, -1)
    table = table_of(chunks_of(128, 64), 128, device)
    order = order_of(x, table, 64, 16)
    assert torch.equal(order, step.bisection_order(x.contiguous(), 64, 16))
    mean = clustering.cluster_means(x, order, 16).wide_mean
    torch.testing.assert_close(mean, step.cluster_means(x.contiguous(), order, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_low_precision_clusters_are_as_tight(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    x = tokens(1, 2, 512 + 200, head_dim, device=device, mean=2.0).to(dtype)
    order = order_of(x, table_of(chunks_of(712, 512), 712, device), 512, 64)
    assert torch.equal(order.flatten(2).sort(-1).values[..., -712:], torch.arange(712, device=device).expand(1, 2, -1))
    expected = spread(x, step.bisection_order(x.float(), 512, 64), 64)
    assert spread(x, order, 64) < QUALITY * expected
    assert expected < 0.8 * spread(x, step.spatial_order(x, 512), 64)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_does_not_matter(scale: float, device: torch.device) -> None:
    x = tokens(1, 2, 64, 16, device=device)
    order = order_of(x * scale, table_of(chunks_of(64, 64), 64, device), 64, 16)
    assert torch.equal(order, step.bisection_order(x, 64, 16))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_what_does_not_differ_keeps_its_order(value: float, device: torch.device) -> None:
    x = torch.full((1, 1, 100, 16), value, device=device)
    order = order_of(x, table_of(chunks_of(100, 64), 100, device), 64, 16)
    assert torch.equal(order, step.spatial_order(x, 64))


def test_of_equal_projections_the_earlier_goes_first(device: torch.device) -> None:
    x = torch.zeros(1, 1, 64, 16, device=device)
    x[0, 0, :, 5] = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0], device=device).repeat(8)
    order = order_of(x, table_of([(0, 64)], 64, device), 64, 32)
    assert torch.equal(order, step.bisection_order(x, 64, 32))


def test_zero_equals_minus_zero(device: torch.device) -> None:
    x = torch.zeros(1, 1, 64, 16, device=device)
    x[:, :, 1::2] = -0.0
    x[:, :, ::8] = -1.0  # a negative direction, so that the signs of zeros reach the projections
    order = order_of(x, table_of([(0, 64)], 64, device), 64, 32)
    assert torch.equal(order, step.bisection_order(x, 64, 32))


@pytest.mark.parametrize("coordinate", [0, 7, 15])
def test_a_mean_of_zero_is_no_obstacle(coordinate: int, device: torch.device) -> None:
    x = torch.zeros(1, 1, 64, 16, device=device)
    x[0, 0, :, coordinate] = torch.randperm(32).add(1).repeat(2).to(device) * torch.tensor(
        [1, -1], device=device
    ).repeat_interleave(32)
    order = order_of(x, table_of([(0, 64)], 64, device), 64, 32)[0, 0, 0]
    assert set(order[:32].tolist()) == set(range(32, 64))


def test_a_second_direction_is_found_without_a_mean_to_start_from(device: torch.device) -> None:
    """Along the first coordinate from end to end, then along the second: neither has a mean."""
    x = torch.zeros(1, 1, 64, 16, device=device)
    side = torch.tensor([1.0, -1.0], device=device)
    x[0, 0, :, 0] = (3 * side).repeat(32)
    x[0, 0, :, 1] = (torch.arange(1, 17, device=device) / 16).repeat_interleave(2).repeat(2) * side.repeat_interleave(
        32
    )
    order = order_of(x, table_of([(0, 64)], 64, device), 64, 16)
    assert torch.equal(order, step.bisection_order(x, 64, 16))
    assert {
        tuple(x[0, 0, members.long(), :2].sign().unique(dim=0).flatten().tolist()) for members in order.view(4, 16)
    } == {(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_gives_a_permutation_and_spoils_its_own_chunk_alone(
    value: float, device: torch.device
) -> None:
    x = tokens(1, 2, 192, 16, device=device)
    table = table_of(chunks_of(192, 64), 192, device)
    clean = order_of(x, table, 64, 16)
    x[:, :, 70, 3] = value
    order = order_of(x, table, 64, 16)
    assert torch.equal(order[:, :, ::2], clean[:, :, ::2])
    assert torch.equal(order[:, :, 1].sort(-1).values, torch.arange(64, 128, device=device).expand(1, 2, -1))


def test_spatial_clusters_are_contiguous(device: torch.device) -> None:
    x = torch.zeros(2, 3, 100, 16, device=device)
    table = table_of(chunks_of(100, 64), 100, device)
    expected = step.spatial_order(x, 64)
    assert torch.equal(clustering.spatial_order(x, table, 64), expected)
    assert torch.equal(order_of(x, table, 64, 64), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "cluster"), [(16, 16), (96, 64), (128, 128), (256, 64)])
def test_means_are_rounded_as_their_rows_are(
    head_dim: int, cluster: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = tokens(1, 2, 200, head_dim, device=device).to(dtype)
    table = table_of(chunks_of(200, 128), 200, device, unused=1)
    order = order_of(x, table, 128, cluster)
    mean = clustering.cluster_means(x, order, cluster).wide_mean
    expected = step.cluster_means(x.float(), order, cluster)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, mean.to(dtype).float())
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(mean, expected, rtol=rounding, atol=1e-6)
    assert (mean[:, :, 2] == 0).all()


def test_without_rows_there_are_no_clusters(device: torch.device) -> None:
    x = torch.randn(2, 3, 40, 16, device=device)
    order = order_of(x, table_of([], 40, device), 64, 16)
    assert order.shape == (2, 3, 0, 64)
    assert clustering.spatial_order(x, table_of([], 40, device), 64).shape == (2, 3, 0, 64)
    assert clustering.cluster_means(x, order, 16)[0].shape == (2, 3, 0, 4, 16)
