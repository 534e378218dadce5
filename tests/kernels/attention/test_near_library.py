"""What stands around the library kernels: copies of what they cannot read, and layouts of the lse."""

import pytest
import torch
from torch import Tensor

from muse_kernels.attention import near_library


@pytest.mark.parametrize(
    ("x", "is_readable"),
    [
        (torch.zeros(1, 2, 8, 16), True),
        (torch.zeros(1, 8, 2, 16).transpose(1, 2), True),
        (torch.zeros(1, 2, 8, 32)[..., 16:], True),
        (torch.zeros(1, 2, 8, 32)[..., 1:17], False),
        (torch.zeros(1, 2, 8, 18)[..., :16], False),
        (torch.zeros(1, 2, 8, 32)[..., ::2], False),
        (torch.zeros(1, 1, 8, 16).expand(-1, 2, -1, -1), False),
    ],
    ids=["contiguous", "tokens first", "part", "odd part", "odd length", "every second", "expanded"],
)
def test_what_kernels_cannot_read_is_copied(x: Tensor, is_readable: bool) -> None:
    copy = near_library._readable(x)
    assert (copy is x) == is_readable
    assert torch.equal(copy, x)
    assert is_readable or copy.is_contiguous()


def test_lse_by_segment_and_back() -> None:
    bounds = torch.tensor([0, 3, 40, 41, 50, 50, 50], dtype=torch.int32)
    lse = torch.randn(1, 2, 50)
    by_segment = near_library._by_segment(lse, bounds, 37)
    assert by_segment.shape == (6, 2, 64)
    assert torch.equal(by_segment[1, :, :37], lse[0, :, 3:40])
    assert by_segment.isfinite().sum() == lse.numel()
    assert (by_segment[by_segment.isinf()] > 0).all()
    assert torch.equal(near_library._by_token(by_segment, bounds, 50), lse)
