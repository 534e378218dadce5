"""Comparison of a result in low precision with a reference in high precision."""

import torch

# A kernel rounds in another order than plain PyTorch does, so its largest error is another draw from the same
# distribution: twice the largest of the one allows for that, while a dropped term or a wrong mask is far outside.
ERROR_MULTIPLE = 2.0


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`, both in float64; NaN if any element is NaN."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    return ((actual - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_as_accurate(
    actual: torch.Tensor,
    *,
    exact: torch.Tensor,
    baseline: torch.Tensor,
    multiple: float = ERROR_MULTIPLE,
    name: str = "result",
) -> None:
    """Fail unless `actual` is as near to `exact` as plain PyTorch in the same dtype comes.

    Both the largest and the root-mean-square error may be at most `multiple` times those of `baseline`, plus two
    roundings of the largest value, of a softmax weight and of its product: the baseline may happen to be exact.

    Args:
        actual: the result under test, any shape, in the working dtype.
        exact: the reference's result in float64.
        baseline: the reference's result, computed in the dtype of `actual`.
        multiple: how many times the baseline's error is accepted. Give a reason where it is not the default.
        name: what is compared, for the message, such as "dq".
    """
    assert exact.dtype is torch.float64, f"{name}: exact must be float64, found {exact.dtype}"
    assert actual.dtype is baseline.dtype, f"{name}: dtype is {actual.dtype}, the baseline's {baseline.dtype}"
    assert actual.shape == exact.shape == baseline.shape, (
        f"{name}: shapes differ: actual {tuple(actual.shape)}, exact {tuple(exact.shape)}, "
        f"baseline {tuple(baseline.shape)}"
    )
    exact = exact.detach().cpu()
    error = (actual.detach().double().cpu() - exact).abs()
    allowed = (baseline.detach().double().cpu() - exact).abs()
    rounding = 2 * torch.finfo(actual.dtype).eps * exact.abs().max()

    worst = tuple(int(index) for index in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
    for statistic in (torch.max, _root_mean_square):
        found, limit = statistic(error).item(), (multiple * statistic(allowed) + rounding).item()
        # Written so that NaN fails.
        assert found <= limit, (
            f"{name}: {statistic.__name__.strip('_')} error {found:.3e}, accepted up to {limit:.3e} "
            f"({multiple} x the baseline's {statistic(allowed).item():.3e}); "
            f"worst at index {worst}"
        )


def _root_mean_square(error: torch.Tensor) -> torch.Tensor:
    return error.square().mean().sqrt()
