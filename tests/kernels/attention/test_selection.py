"""Which clusters the kernels retrieve: the reference's, number by number.

Contiguous clusters, so that both implementations choose among the same ones; float32 and random inputs, so that no two
scores are near enough to each other for rounding to decide.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from muse_kernels import muse_clusters
from tests.kernels.attention.test_streaming import CU_SEQLENS, SMALL, make_qkv, name

SPATIAL = {**SMALL, "query_clustering": "spatial", "key_clustering": "spatial"}

OPTIONS: list[dict[str, Any]] = [
    {"candidates": 3},
    {"candidates": 5, "top_k": 3, "causal": False},
    {"candidates": 20},
    {"candidates": 1},
    {"candidates": 4, "top_k": 5},
    {"candidates": 5, "expansion": "zero", "order": 0},
    {"selection": "centroid"},
    {"selection": "centroid", "causal": False, "expansion": "zero"},
]


def both(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`selected` by kernels and by the reference."""
    made = (muse_clusters(q, k, implementation=each, **{**SPATIAL, **options}) for each in ("triton", "reference"))
    by_kernels, by_reference = (clusters.selected for clusters in made)
    return by_kernels, by_reference


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_the_clusters_are_those_of_the_reference(options: dict[str, Any], device: torch.device) -> None:
    q, k, _ = make_qkv(330, device)
    by_kernels, by_reference = both(q, k, **options)
    assert torch.equal(by_kernels, by_reference)
    assert by_reference.unique().numel() > 5  # it does choose


@pytest.mark.parametrize("options", [{"candidates": 3}, {"selection": "centroid"}], ids=name)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_documents_and_grouped_heads(causal: bool, options: dict[str, Any], device: torch.device) -> None:
    q, k, _ = make_qkv(300, device, heads=4, kv_heads=2)
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=device)
    assert torch.equal(*both(q, k, cu_seqlens=cu_seqlens, causal=causal, **options))


def test_of_equal_scores_the_earlier_cluster_is_taken(device: torch.device) -> None:
    q, k, _ = make_qkv(256, device)
    by_kernels, _ = both(q, torch.ones_like(k), candidates=5, top_k=3)
    assert (by_kernels[:, :, 2:] == torch.arange(3, device=device)).all()


@pytest.mark.parametrize("selection", ["peak_mass", "centroid"])
def test_a_key_that_is_not_a_number_moves_nothing_but_what_sees_it(selection: str, device: torch.device) -> None:
    """Not even the choices of the query clusters that lie beside those that do."""
    q, k, _ = make_qkv(256, device, heads=2, kv_heads=2)
    options = {"candidates": 6, "selection": selection}
    before, _ = both(q, k, **options)
    k[0, 0, 150] = float("nan")  # in the third chunk: near for it, far for the fourth
    after, _ = both(q, k, **options)
    assert torch.equal(after[0, 1], before[0, 1])
    assert torch.equal(after[0, 0, :2], before[0, 0, :2])
    for chosen in after[0, 0].flatten(0, 1).tolist():
        valid = [cluster for cluster in chosen if cluster >= 0]
        assert valid == sorted(set(valid))
        assert chosen == valid + [-1] * (len(chosen) - len(valid))
