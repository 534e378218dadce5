"""The nucleus against a loop, draws against their probabilities."""

import pytest
import torch

from muse_lightning.errors import UserError
from muse_lightning.pretrained.sampling import Sampler, nucleus

CPU = torch.device("cpu")


def nucleus_by_loop(probabilities: list[float], top_p: float) -> dict[int, float]:
    """Token -> probability: the most likely ones until they sum to top_p."""
    kept: dict[int, float] = {}
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = probabilities[token]
    return kept


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_the_nucleus_against_a_loop(top_p: float, sharpness: float) -> None:
    probabilities = (sharpness * torch.randn(50, dtype=torch.float64)).softmax(-1)
    kept, tokens = nucleus(probabilities, top_p)
    found = {int(token): float(p) for token, p in zip(tokens, kept, strict=True) if p > 0}
    assert found == nucleus_by_loop(probabilities.tolist(), top_p)


def test_a_nucleus_that_sums_exactly_has_no_more() -> None:
    kept, tokens = nucleus(torch.tensor([0.25, 0.5, 0.125, 0.125]), 0.75)
    assert kept.tolist() == [0.5, 0.25, 0.0, 0.0]
    assert tokens.tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_draws_have_their_probabilities(temperature: float, top_p: float) -> None:
    logits = torch.randn(6)
    expected = torch.zeros(6)
    for token, p in nucleus_by_loop((logits / temperature).softmax(-1).tolist(), top_p).items():
        expected[token] = p
    expected /= expected.sum()
    sampler = Sampler(temperature, top_p, seed=1, device=CPU)
    draws = torch.tensor([sampler.choose(logits) for _ in range(4000)])
    found = torch.bincount(draws, minlength=6) / 4000
    assert (found - expected).abs().max() < 0.03  # four standard deviations of a frequency are at most 0.032
    assert (found[expected == 0] == 0).all()


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(1.0, 1.0, seed, CPU)
        return [sampler.choose(torch.zeros(1000)) for _ in range(10)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cold_is_greedy(temperature: float, dtype: torch.dtype) -> None:
    sampler = Sampler(temperature, 1.0, seed=0, device=CPU)
    logits = torch.tensor([-60000.0, 3.0, 7.0, 60000.0, 5.0], dtype=dtype)
    assert [sampler.choose(logits) for _ in range(5)] == [3] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "found"),
    [([0.0, float("nan"), 1.0], "nan"), ([0.0, float("inf")], "inf"), ([float("-inf")] * 2, "-inf")],
)
@pytest.mark.parametrize(
    ("dtype", "cause"),
    [
        ("float16", "next: --dtype=float32, where weights are finite"),
        ("float32", "weights of the model are not finite"),
    ],
)
def test_logits_that_are_not_finite(
    temperature: float, logits: list[float], found: str, dtype: str, cause: str
) -> None:
    sampler = Sampler(temperature, 1.0, None, CPU)
    with pytest.raises(UserError) as error:
        sampler.choose(torch.tensor(logits, dtype=getattr(torch, dtype)))
    assert str(error.value) == f"logits are not finite ({found}), computed in {dtype}; {cause}"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_of_probability_0(temperature: float) -> None:
    assert Sampler(temperature, 1.0, None, CPU).choose(torch.tensor([float("-inf"), 0.0])) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, 1.0, None), "temperature is -0.1; it must be at least 0 and finite"),
        ((float("nan"), 1.0, None), "temperature is nan"),
        ((float("inf"), 1.0, None), "temperature is inf"),
        ((1.0, 0.0, None), "top_p is 0.0; it must be above 0 and at most 1"),
        ((1.0, 1.01, None), "top_p is 1.01"),
        ((1.0, float("nan"), None), "top_p is nan"),
        ((1.0, 1.0, -1), "seed is -1; it must be at least 0 and below 2^63"),
        ((1.0, 1.0, 2**63), "seed is 9223372036854775808"),
    ],
)
def test_values_out_of_range(values: tuple[float, float, int | None], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("^", r"\^")):
        Sampler(*values, device=CPU)
