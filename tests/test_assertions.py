"""The comparison helper and the shared fixtures: a test tool that cannot fail would prove nothing."""

import pytest
import torch

from tests.assertions import assert_as_accurate, relative_error


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(8, 64, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_result_rounded_once_is_accepted(exact: torch.Tensor, dtype: torch.dtype) -> None:
    rounded = exact.to(dtype)
    assert_as_accurate(rounded, exact=exact, baseline=rounded)
    assert_as_accurate(rounded, exact=exact, baseline=exact.float().to(dtype))


def test_a_single_wrong_element_is_named(exact: torch.Tensor) -> None:
    wrong = exact.half()
    wrong[3, 5] += 0.1
    with pytest.raises(AssertionError, match=r"dq: max error .* worst at index \(3, 5\)"):
        assert_as_accurate(wrong, exact=exact, baseline=exact.half(), name="dq")


def test_a_small_error_everywhere_is_found_by_the_root_mean_square(exact: torch.Tensor) -> None:
    baseline = exact.float()
    baseline[0, 0] += 1e-2
    with pytest.raises(AssertionError, match="root_mean_square error"):
        assert_as_accurate(exact.float() + 5e-3, exact=exact, baseline=baseline)


def test_nan_is_never_accepted(exact: torch.Tensor) -> None:
    broken = exact.float()
    broken[0, 0] = float("nan")
    with pytest.raises(AssertionError, match=r"error nan.*index \(0, 0\)"):
        assert_as_accurate(broken, exact=exact, baseline=exact.float())


@pytest.mark.parametrize(
    ("actual", "baseline", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), "shapes differ"),
        (torch.zeros(2, 2), torch.zeros(2, 2).half(), "dtype is torch.float32"),
    ],
    ids=["shape", "dtype"],
)
def test_unlike_tensors_are_refused(actual: torch.Tensor, baseline: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_as_accurate(actual, exact=torch.zeros(2, 2, dtype=torch.float64), baseline=baseline)


def test_relative_error_is_the_ratio_of_norms() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda dtype: torch.empty(4, dtype=dtype),
        lambda dtype: torch.empty_like(torch.zeros(4, dtype=dtype)),
        lambda dtype: torch.empty_strided((4,), (1,), dtype=dtype),
        lambda dtype: torch.zeros(1, dtype=dtype).new_empty(4),
        lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((4,), (1,)),
    ],
    ids=["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"],
)
def test_unwritten_memory_is_poisoned(allocate) -> None:
    assert allocate(torch.float32).isnan().all()
    assert allocate(torch.bfloat16).isnan().all()
    assert (allocate(torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.parametrize("turn", [1, 2])
def test_each_test_starts_from_the_same_seed(turn: int) -> None:
    assert torch.initial_seed() == 20250912
    assert torch.equal(torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(20250912)))
