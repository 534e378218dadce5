"""The steps of the operator, each against its definition in docs/attention.md."""

import math

import pytest
import torch

from muse_kernels.attention import reference as step

TINY = 1e-12
"""float64 rounding of sums over a few dozen terms."""


def random_clusters(num_query_clusters: int, num_key_clusters: int, keys: int, head_dim: int) -> tuple:
    mu = torch.randn(1, 1, num_query_clusters, head_dim, dtype=torch.float64)
    k, v = torch.randn(2, 1, 1, num_key_clusters, keys, head_dim, dtype=torch.float64)
    return mu, k, v, torch.ones(num_key_clusters, keys, dtype=torch.bool)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_summary_never_overstates_a_clusters_mass_and_is_exact_at_mu(scale: float) -> None:
    mu, k, v, is_key = random_clusters(3, 5, keys=8, head_dim=6)
    summary = step.summaries(mu, k, v, is_key[:, None])
    q = mu.unsqueeze(3) + scale * torch.randn(1, 1, 3, 16, 6, dtype=torch.float64)
    q[:, :, :, 0] = mu
    in_sight = torch.ones(3, 5, dtype=torch.bool)

    logits = step.summary_logits(q, mu, summary, in_sight, order=1)
    true_mass = torch.einsum("btasd,btmkd->btasmk", q, k).logsumexp(-1)

    assert (logits <= true_mass + TINY).all()
    assert (logits < true_mass - 1e-6).any()
    torch.testing.assert_close(logits[:, :, :, 0], true_mass[:, :, :, 0])


def test_order_0_is_the_mass_at_mu_for_every_query() -> None:
    mu, k, v, is_key = random_clusters(2, 3, keys=4, head_dim=6)
    summary = step.summaries(mu, k, v, is_key[:, None])
    logits = step.summary_logits(torch.randn(1, 1, 2, 5, 6).double(), mu, summary, torch.ones(2, 3).bool(), order=0)
    expected = torch.einsum("btad,btmkd->btamk", mu, k).logsumexp(-1)
    torch.testing.assert_close(logits, expected.unsqueeze(3).expand(-1, -1, -1, 5, -1))


def test_empty_places_have_no_mass() -> None:
    mu, k, v, is_key = random_clusters(2, 2, keys=4, head_dim=6)
    is_key[0, 3] = False
    is_key[1] = False
    summary = step.summaries(mu, k, v, is_key[:, None])
    shorter = step.summaries(mu, k[:, :, :1, :3], v[:, :, :1, :3], is_key[:1, None, :3])
    for full, short in zip(summary, shorter, strict=True):
        torch.testing.assert_close(full[:, :, :, :1], short)
    assert (summary.log_mass[..., 1] == -math.inf).all()
    assert (summary.kbar[..., 1, :] == 0).all()
    assert (summary.vbar[..., 1, :] == 0).all()


@pytest.mark.parametrize("left_out", ["nothing", "empty places", "retrieved clusters"])
def test_summaries_backward_is_the_derivative(left_out: str) -> None:
    mu, k, v, is_key = random_clusters(3, 2, keys=4, head_dim=5)
    if left_out == "empty places":
        is_key[1, 2:] = False
    is_summarised = is_key[:, None].expand(2, 3, 4).clone()
    if left_out == "retrieved clusters":  # of two keys each, by one query cluster or another; all of a run by one
        is_summarised[0, 1, :2] = is_summarised[1, 1:, 2:] = is_summarised[1, 2] = False
    k.requires_grad_(), v.requires_grad_()
    summary = step.summaries(mu, k, v, is_summarised)
    gradient = step.Summaries(*(torch.randn_like(x) for x in summary))
    expected = torch.autograd.grad([x.nan_to_num(neginf=0) for x in summary], (k, v), gradient)
    actual = step.summaries_backward(mu, k, v, is_summarised, summary, gradient)
    torch.testing.assert_close(actual, expected)


def test_a_retrieved_cluster_is_not_in_the_summary() -> None:
    mu, k, v, is_key = random_clusters(2, 1, keys=8, head_dim=6)
    is_summarised = is_key[:, None].expand(1, 2, 8).clone()
    is_summarised[0, 0, 2:4] = False
    found = step.summaries(mu, k, v, is_summarised)
    left = torch.tensor([0, 1, 4, 5, 6, 7])
    without = step.summaries(mu[:, :, :1], k[..., left, :], v[..., left, :], is_key[:, None, left])
    whole = step.summaries(mu[:, :, 1:], k, v, is_key[:, None])
    for x, first, second in zip(found, without, whole, strict=True):
        torch.testing.assert_close(x, torch.cat((first, second), 2))


@pytest.mark.parametrize("length", [32, 27, 9, 1])
@pytest.mark.parametrize("cluster", [4, 32])
def test_bisection_makes_full_clusters_and_fills_a_partial_chunk_from_the_first(length: int, cluster: int) -> None:
    order = step.bisection_order(torch.randn(2, 3, 64 + length, 5), chunk=32, cluster=cluster)
    assert order.shape == (2, 3, 3, 32)
    for chunk in range(3):
        members = order[:, :, chunk]
        count = 32 if chunk < 2 else length
        expected = torch.arange(chunk * 32, chunk * 32 + count, dtype=torch.int32).expand(2, 3, -1)
        torch.testing.assert_close(members[..., :count].sort(-1).values, expected)
        assert (members[..., count:] == -1).all()


def test_bisection_separates_what_is_apart() -> None:
    centres = torch.tensor([[10.0, 0], [-10, 0], [10, 3], [-10, 3]])
    label = torch.randperm(64) % 4
    x = centres[label] + 0.1 * torch.randn(64, 2)
    clusters = label[step.bisection_order(x[None, None], chunk=64, cluster=16)[0, 0].long()].view(4, 16)
    assert (clusters == clusters[:, :1]).all()


@pytest.mark.parametrize("length", [32, 27])
def test_bisection_splits_at_the_median_and_keeps_the_order_of_tokens(length: int) -> None:
    x = 0.1 * torch.randn(1, 1, length, 5)
    x[..., 3] = torch.randperm(length).float()
    order = step.bisection_order(x, chunk=32, cluster=8)[0, 0, 0]
    main = x[0, 0, :, 3]
    direction = 1 if main[order[0]] < length / 2 else -1
    first, second = (half[half >= 0].long() for half in (order[:16], order[16:]))
    assert (direction * main[first]).max() < (direction * main[second]).min()
    assert len(first) == 16
    for cluster in order.view(4, 8):
        members = cluster[cluster >= 0]
        assert (members.diff() > 0).all()
        assert (cluster[len(members) :] == -1).all()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Absolute correlation of two lists of numbers."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1].abs())


def test_directions_are_those_of_greatest_variance() -> None:
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    by_axis = torch.randn(4096, 4) * torch.tensor([1.0, 3.0, 0.5, 2.0])
    first, second = step.main_projections(by_axis @ rotation.T + 5, torch.ones(4096, dtype=torch.bool))
    assert correlation(first, by_axis[:, 1]) > 0.99
    assert correlation(second, by_axis[:, 3]) > 0.99


@pytest.mark.parametrize(("width", "coordinates"), [(0.5, [1, 1]), (0.01, [2, 2]), (None, [1, 2])])
def test_halves_are_split_by_what_varies_more_in_them(width: float | None, coordinates: list[int]) -> None:
    """First by coordinate 1; then also by it, by the second widest, or one half by this, the other by that."""
    x = torch.zeros(64, 4)
    side = torch.arange(64) % 2
    spread = torch.rand(64) * (width if width is not None else torch.where(side == 0, 0.5, 0.01))
    x[:, 1] = 20 * side + spread * 10
    x[:, 2] = torch.rand(64)
    order = step.bisection_order(x[None, None], 64, 16)[0, 0].long().view(2, 2, 16)
    if x[order[0].flatten(), 1].mean() > x[order[1].flatten(), 1].mean():
        order = order.flip(0)  # the sign of a direction is free
    for half, coordinate in zip(x[order], coordinates, strict=True):
        low, high = half[:, :, coordinate]
        assert low.max() <= high.min() or high.max() <= low.min()


@pytest.mark.parametrize("coordinate", range(4))
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_a_direction_is_found_whichever_coordinate_varies(coordinate: int, mean: float) -> None:
    """Also where the mean is 0 and gives the power iteration nothing to start from."""
    x = torch.zeros(16, 4)
    x[:, coordinate] = torch.tensor([-1.5, -0.5, 0.5, 1.5])[torch.randperm(16) % 4] + mean
    projection, _ = step.main_projections(x, torch.ones(16, dtype=torch.bool))
    assert torch.corrcoef(torch.stack([projection, x[:, coordinate]]))[0, 1] > 0.999


def test_the_second_direction_is_found_without_a_mean_to_start_from() -> None:
    x = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]])
    first, second = step.main_projections(x, torch.ones(4, dtype=torch.bool))
    assert first.abs().tolist() == pytest.approx((x[:, 0].abs() / 2).tolist())
    assert second.abs().tolist() == pytest.approx((x[:, 1].abs() / 2).tolist())


def test_selection_passes_over_nan() -> None:
    scores = torch.tensor([[math.nan, 1.0, 3.0, math.nan, 2.0]])
    assert step.select(scores, torch.ones(1, 5, dtype=torch.bool), 2).tolist() == [[2, 4]]


def test_bisection_of_nan_is_still_a_permutation() -> None:
    x = torch.randn(1, 1, 32, 4)
    x[0, 0, 5] = math.nan
    assert step.bisection_order(x, 16, 4).flatten().sort().values.tolist() == list(range(32))


@pytest.mark.parametrize("x", [torch.ones(1, 1, 16, 4), torch.zeros(1, 1, 16, 4)], ids=["all equal", "all zero"])
def test_bisection_keeps_the_order_of_what_does_not_differ(x: torch.Tensor) -> None:
    torch.testing.assert_close(step.bisection_order(x, 8, 2), step.spatial_order(x, 8))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bisection_does_not_depend_on_scale(scale: float) -> None:
    x = torch.randn(1, 2, 64, 8)
    torch.testing.assert_close(step.bisection_order(x * scale, 32, 4), step.bisection_order(x, 32, 4))


def test_peak_mass_and_selection_against_loops() -> None:
    peaks, near_lse = torch.randn(1, 2, 3, 4, 9), torch.randn(1, 2, 3, 4)
    is_query = torch.ones(3, 4, dtype=torch.bool)
    is_query[2, 3] = False
    in_sight = torch.rand(3, 9) < 0.6
    in_sight[0] = torch.arange(9) < 1
    mass = step.peak_mass(peaks.masked_fill(~in_sight[:, None], -math.inf), near_lse, is_query)
    selected = step.select(mass, in_sight, top_k=3)
    for head in range(2):
        for a in range(3):
            seen = in_sight[a].nonzero().flatten()
            total = torch.zeros(9)
            for s in range(4):
                if is_query[a, s]:
                    exponentials = peaks[0, head, a, s, seen].exp()
                    total[seen] += exponentials / (exponentials.sum() + near_lse[0, head, a, s].exp())
            torch.testing.assert_close(mass[0, head, a, seen].exp(), total[seen])
            best = total[seen].argsort(descending=True)[:3]
            expected = seen[best].sort().values.tolist()
            assert selected[0, head, a].tolist() == expected + [-1] * (3 - len(expected))


def test_merge_by_lse_equals_softmax_over_both() -> None:
    logits, values = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    parts = [(logits[:, s].softmax(-1) @ values[s], logits[:, s].logsumexp(-1)) for s in (slice(3), slice(3, 7))]
    out, lse = step.merge_by_lse(*parts[0], *parts[1])
    torch.testing.assert_close(out, logits.softmax(-1) @ values)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    nothing = torch.full((5,), -math.inf, dtype=torch.float64)
    torch.testing.assert_close(step.merge_by_lse(*parts[0], torch.zeros(5, 3).double(), nothing), parts[0])
    out, lse = step.merge_by_lse(torch.zeros(5, 3), nothing, torch.zeros(5, 3), nothing)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
