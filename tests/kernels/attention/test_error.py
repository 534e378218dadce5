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
    ({}, 0.0273, 0.0596),
    ({"top_k": 8}, 0.0440, 0.0922),
    ({"top_k": 16}, 0.0193, 0.0434),
    ({"top_k": 0}, 0.1780, 0.4413),
    ({"candidates": 64}, 0.0221, 0.0482),
    ({"summary_cluster": 64}, 0.0250, 0.0542),
    ({"summary_cluster": 2048}, 0.0275, 0.0606),
    ({"selection": "centroid"}, 0.0785, 0.1173),
    ({"order": 0}, 0.0275, 0.0614),
    ({"chunk": 1024}, 0.0305, 0.0542),
    (SPATIAL, 0.0767, 0.1137),
    ({**SPATIAL, "expansion": "zero", "summary_cluster": 64}, 0.0779, 0.1164),
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
