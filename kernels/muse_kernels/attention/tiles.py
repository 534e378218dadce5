"""Tile sizes, warps and pipeline stages of every kernel, in one place: chosen on an H100, fit for sm_80 on.

Fixed tables, no tuning at run time: the same shapes give the same launch, and nothing is compiled twice.
"""

from torch import Tensor

_TILES: dict[str, dict[str, int]] = {
    "summaries": {"A": 64, "CLUSTERS": 16, "num_warps": 4, "num_stages": 3},
    "scores": {"COLUMNS": 128, "num_warps": 4, "num_stages": 2},
    "select": {"BLOCK": 512, "num_warps": 2},
    "far": {"COLUMNS": 64, "num_warps": 4, "num_stages": 2},
    "far_backward": {"COLUMNS": 64, "num_warps": 8, "num_stages": 3},
    "key_gradients": {"QUERIES": 64, "A": 64, "SUMMARY_STAGES": 1, "num_warps": 4, "num_stages": 2},
}


def tile_of(kernel: str, operand: Tensor) -> dict[str, int]:
    """Constants and launch options of one kernel for operands [..., padded D] of some dtype."""
    return dict(_TILES[kernel])
