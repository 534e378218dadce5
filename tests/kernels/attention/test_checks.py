"""Sizes that the kernels refuse; wrong arguments of `muse_attention` are in test_op.py."""

import pytest
import torch

from muse_kernels.attention.checks import obstacle_to_kernels
from muse_kernels.attention.options import MuseOptions


@pytest.mark.parametrize(
    ("head_dim", "num_documents", "num_tokens", "is_accepted"),
    [
        (128, None, 2**24 - 2048, True),
        (128, None, 2**24, False),
        (80, 2000, 2**24 - 2**20, False),  # heads of 128 to the kernels, and a third chunk for every document
        (64, None, 2**25 - 2048, True),
        (4, None, 2**25, False),  # more runs of key clusters than a launch has programs on an axis
    ],
)
def test_kernels_refuse_what_they_cannot_count(
    head_dim: int, num_documents: int | None, num_tokens: int, is_accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.empty(1, dtype=torch.bfloat16).expand(1, 1, num_tokens, head_dim)
    cu_seqlens = None if num_documents is None else torch.zeros(num_documents + 1, dtype=torch.int32)
    options = MuseOptions(implementation="triton").resolved(head_dim, has_documents=cu_seqlens is not None)
    obstacle = obstacle_to_kernels(q, options, cu_seqlens)
    assert (obstacle is None) == is_accepted, obstacle
    assert is_accepted or "accepts up to" in str(obstacle)
