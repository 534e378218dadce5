"""Error of MuSe attention against exact attention on recorded heads, setting by setting, as a Markdown table.

Usage: python tools/attention_error.py FILE... [--tokens N] [--json FILE]

FILE: torch.save of one head's q (after RoPE, before scaling), k (after RoPE) and v, [3, N, D]; two are in
tests/data/activations.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse_kernels import muse_attention
from muse_lightning.attention import Dense, SlidingWindow
from muse_lightning.measure.attention_error import relative_squared_error

SPATIAL = {"query_clustering": "spatial", "key_clustering": "spatial"}
SPATIAL_BLOCKS = {**SPATIAL, "expansion": "zero", "summary_cluster": 64}
DEFAULT = "default: clusters 128/64, summaries of 512 keys, peak mass, top_k 12, candidates 48"
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    (DEFAULT, {}),
    ("top_k 8", {"top_k": 8}),
    ("top_k 16", {"top_k": 16}),
    ("top_k 20", {"top_k": 20}),
    ("top_k 24", {"top_k": 24}),
    ("top_k 0", {"top_k": 0}),
    ("candidates 32", {"candidates": 32}),
    ("candidates 64", {"candidates": 64}),
    ("candidates 32, top_k 16", {"candidates": 32, "top_k": 16}),
    *((f"summaries of {size} keys", {"summary_cluster": size}) for size in (64, 128, 256, 1024, 2048)),
    ("centroid", {"selection": "centroid"}),
    ("order 0", {"order": 0}),
    ("clusters 64/64", {"query_cluster": 64}),
    ("clusters 32/64", {"query_cluster": 32}),
    ("clusters 256/64", {"query_cluster": 256}),
    ("clusters 128/32, top_k 24, candidates 64", {"key_cluster": 32, "top_k": 24, "candidates": 64}),
    ("clusters 128/16, top_k 48, candidates 96", {"key_cluster": 16, "top_k": 48, "candidates": 96}),
    ("chunk 512, top_k 24", {"chunk": 512, "top_k": 24}),
    ("chunk 1024", {"chunk": 1024}),
    ("chunk 1024, top_k 20", {"chunk": 1024, "top_k": 20}),
    ("chunk 1024, top_k 20, clusters 64/64", {"chunk": 1024, "top_k": 20, "query_cluster": 64}),
    ("chunk 4096", {"chunk": 4096}),
    ("keys clustered only", {"query_clustering": "spatial"}),
    ("queries clustered only", {"key_clustering": "spatial"}),
    ("spatial clusters, order 1", SPATIAL),
    ("SpatialBlocks: spatial clusters, plain means", SPATIAL_BLOCKS),
    ("SpatialBlocks, selection by centroid", {**SPATIAL_BLOCKS, "selection": "centroid"}),
]


def errors_of_head(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Relative squared error of every setting, in float32 and plain PyTorch, for q, k, v [1, 1, N, D]."""
    scale = q.shape[-1] ** -0.5
    exact = Dense(0)(q, k, v, softmax_scale=scale)
    results = {
        label: relative_squared_error(
            muse_attention(q, k, v, **{"exact_below": 0, "implementation": "reference", **options}),  # type: ignore[arg-type]
            exact,
        ).item()
        for label, options in SETTINGS
    }
    window = SlidingWindow(0, window=2048)(q, k, v, softmax_scale=scale)
    results["SlidingWindow of 2048"] = relative_squared_error(window, exact).item()
    return results


def main(args: Sequence[str] | None = None) -> None:
    """Print the table and, if asked, write one JSON line per head and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=None, help="only the first N tokens")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads: dict[str, dict[str, float]] = {}
    for path in options.files:
        qkv = torch.load(path, weights_only=True)[:, : options.tokens].to(device, torch.float32)
        heads[f"{path.stem}, {qkv.shape[1]} tokens"] = errors_of_head(*qkv[:, None, None])
    print("| setting | " + " | ".join(heads) + " |")
    print("| --- |" + " --- |" * len(heads))
    for label in next(iter(heads.values())):
        print(f"| {label} | " + " | ".join(f"{errors[label]:.3f}" for errors in heads.values()) + " |")
    if options.json:
        records = [
            {"head": head, "setting": label, "relative_squared_error": error}
            for head, errors in heads.items()
            for label, error in errors.items()
        ]
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
