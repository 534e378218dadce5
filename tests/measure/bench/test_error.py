"""Error of MuSe attention on a head."""

from dataclasses import replace

import pytest
import torch

from muse_lightning.measure.bench.error import head_errors
from tests.measure.bench.fabricated import SMALL


def test_more_retrieved_clusters_come_nearer_to_exact_attention() -> None:
    qkv = torch.randn(3, 256, 16) * torch.tensor([3.0, 1.0, 1.0])[:, None, None]
    errors = head_errors("random", qkv, replace(SMALL, top_k=4), torch.bfloat16, "cpu")
    assert [error.top_k for error in errors] == [0, 2, 4, 8]
    for metric in ("relative_squared_error", "cosine_dq", "cosine_dk", "cosine_dv"):
        values = [getattr(error, metric) for error in errors]
        assert values == sorted(values, reverse=metric == "relative_squared_error"), metric
    assert 0 < errors[3].relative_squared_error < errors[0].relative_squared_error < 1


def test_all_clusters_retrieved_is_exact_attention() -> None:
    error = head_errors("random", torch.randn(3, 256, 16), replace(SMALL, top_k=100), torch.float32, "cpu")[2]
    assert error.top_k == 100
    assert error.relative_squared_error < 1e-10
    assert (error.cosine_dq, error.cosine_dk, error.cosine_dv) == pytest.approx((1, 1, 1))
