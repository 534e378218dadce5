"""What is trained to look for leaks: small enough for a processor, and as long as real chunks on a GPU."""

from dataclasses import replace
from typing import Any

import torch

from tests.leak.training import Setting


def _muse(**options: Any) -> dict[str, Any]:
    return {"exact_below": 0, **options}


SMALL = Setting(
    # Small clusters, of which later queries move the centroids most, and more far keys than near ones.
    _muse(chunk=64, query_cluster=4, key_cluster=4, top_k=1, implementation="reference"),
    seq_len=256,
    batch_size=4,
    steps=400,
    # Of one layer the controls are learned soonest.
    num_layers=1,
)
"""15 seconds on one core; measured on 65,536 tokens."""

SUMMARIES_ALONE = replace(SMALL, muse=SMALL.muse | {"top_k": 0})

CONTIGUOUS_QUERIES = Setting(
    _muse(chunk=8, query_cluster=2, key_cluster=2, top_k=1, query_clustering="spatial", implementation="reference"),
    seq_len=32,
    batch_size=16,
    steps=400,
    num_heads=4,
    head_dim=8,
)
SEMANTIC_QUERIES = Setting(
    _muse(chunk=16, query_cluster=8, key_cluster=2, summary_cluster=16, top_k=0, implementation="reference"),
    seq_len=64,
    batch_size=16,
    steps=600,
)
"""This and the one before are known to leak, without any mistake in the code: docs/attention.md, "Causality"."""

REAL_CHUNKS = Setting(
    _muse(chunk=2048, query_cluster=128, key_cluster=64, top_k=12, implementation="triton"),
    seq_len=16_384,
    batch_size=8,
    steps=1500,
    num_layers=1,
    eval_batches=16,
    device="cuda",
    precision=torch.bfloat16,
)
"""Default sizes, kernels, mixed precision; measured on 2 million tokens."""
