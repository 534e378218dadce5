"""Error of plain PyTorch against exact attention on two recorded heads, held to what was measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muse_kernels import muse_attention

ACTIVATIONS = Path(__file__).parents[2] / "data" / "activations"
TOLERANCE = 0.05
"""Relative. The figures have two digits, and sums in another order move a token across a median now and then."""

SPATIAL = {"query_clustering": "spatial", "key_clustering": "spatial"}
MEASURED: list[tuple[dict[str, Any], float, float]] = [
    ({}, 0.0186, 0.0517),
    ({"top_k": 8}, 0.0328, 0.0917),
    ({"top_k": 16}, 0.0118, 0.0306),
    ({"top_k": 0}, 0.1794, 0.4562),
    ({"candidates": 64}, 0.0183, 0.0492),
    ({"summary_cluster": 64}, 0.0176, 0.0479),
    ({"summary_cluster": 2048}, 0.0187, 0.0524),
    ({"selection": "centroid"}, 0.0782, 0.1229),
    ({"order": 0}, 0.0191, 0.0535),
    ({"chunk": 1024}, 0.0233, 0.0506),
    (SPATIAL, 0.0594, 0.0856),
    ({**SPATIAL, "expansion": "zero", "summary_cluster": 64}, 0.0606, 0.0873),
]
"""benchmarks/results/2026-11-29_cpu_coarse-summaries.md, "16,384 tokens": what plain PyTorch gave, held to here."""


@pytest.mark.parametrize(
    ("head", "options", "figure"),
    [
        *(("layer1_head3", options, figure) for options, figure, _ in MEASURED),
        *(("layer6_head10", options, figure) for options, _, figure in MEASURED),
    ],
)
def test_relative_squared_error_at_16k(head: str, options: dict[str, object], figure: float) -> None:
    q, k, v = torch.load(ACTIVATIONS / f"{head}.pt", weights_only=True).float()[:, None, None]
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = muse_attention(q, k, v, **options)
    error = ((out - exact).square().sum() / exact.square().sum()).item()
    assert error == pytest.approx(figure, rel=TOLERANCE)
