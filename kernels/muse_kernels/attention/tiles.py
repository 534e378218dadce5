"""Tile sizes, warps, pipeline stages and registers of every kernel, in one place.

A fixed table, no tuning at run time: the same shapes give the same launch, and nothing is compiled twice. A tile
depends on the bytes of an operand's row and on the shared memory that the GPU gives one block. LARGE, rows of up to 256
bytes, was timed on an H100; the others were chosen by what compiles with few spilled registers.
`tests/kernels/attention/test_compile.py` holds every one to the memory of sm_80, 89, 90 and 100.
"""

import functools

import torch
from torch import Tensor

from muse_kernels.attention.common import padded_head_dim

Tile = dict[str, int]
"""Constants of a kernel and launch options (num_warps, num_stages, maxnreg)."""

LARGE = 200 * 1024
"""Bytes of shared memory from which a GPU takes the first table: 227 KiB on sm_90 and 100, less on others."""

LARGEST_ROW = 256
"""Bytes of a row that any GPU has memory for: two tiles of 128 queries, and keys beside them, lie in shared memory."""

LARGEST_ROW_HOPPER = 512
"""Only sm_90 has room for more: sm_80 has less shared memory, and sm_100 no tensor memory for three such results."""

# Kernel -> bytes of a row, at least -> tile.
_LARGE: dict[str, dict[int, Tile]] = {
    "summaries": {
        128: {"A": 64, "CLUSTERS": 16, "num_warps": 4, "num_stages": 3},
        512: {"A": 64, "CLUSTERS": 8, "num_warps": 8, "num_stages": 1},
    },
    "scores": {
        128: {"A": 64, "CLUSTERS": 16, "num_warps": 4, "num_stages": 3},
        512: {"A": 64, "CLUSTERS": 16, "num_warps": 8, "num_stages": 2},
    },
    "select": {128: {"BLOCK": 512, "num_warps": 2}},
    "select_by_peaks": {
        128: {"num_warps": 4, "num_stages": 3},
        512: {"num_warps": 8, "num_stages": 2},
    },
    "far": {
        128: {"COLUMNS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 3},
        256: {"COLUMNS": 32, "KEYS": 32, "num_warps": 4, "num_stages": 3},
        512: {"COLUMNS": 64, "KEYS": 64, "num_warps": 8, "num_stages": 1},
    },
    "far_backward": {
        128: {"COLUMNS": 32, "KEYS": 64, "num_warps": 4, "num_stages": 3},
        256: {"COLUMNS": 64, "KEYS": 64, "num_warps": 8, "num_stages": 3},
        512: {"COLUMNS": 64, "KEYS": 64, "num_warps": 8, "num_stages": 1},
    },
    "key_gradients": {
        128: {"QUERIES": 64, "A": 64, "SUMMARY_STAGES": 1, "num_warps": 4, "num_stages": 2},
        256: {"QUERIES": 64, "A": 64, "SUMMARY_STAGES": 1, "num_warps": 4, "num_stages": 2},
        512: {"QUERIES": 64, "A": 64, "SUMMARY_STAGES": 1, "num_warps": 8, "num_stages": 1},
    },
}
_SMALL: dict[str, dict[int, Tile]] = {
    "summaries": {
        128: {"A": 64, "CLUSTERS": 16, "num_warps": 4, "num_stages": 3},
        256: {"A": 64, "CLUSTERS": 8, "num_warps": 4, "num_stages": 1},
    },
    "scores": {
        128: {"A": 64, "CLUSTERS": 16, "num_warps": 4, "num_stages": 3},
        256: {"A": 64, "CLUSTERS": 16, "num_warps": 4, "num_stages": 2},
    },
    "select": {128: {"BLOCK": 512, "num_warps": 2}},
    "select_by_peaks": {
        128: {"num_warps": 4, "num_stages": 3},
        256: {"num_warps": 4, "num_stages": 2},
    },
    "far": {
        128: {"COLUMNS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2},
        256: {"COLUMNS": 32, "KEYS": 64, "num_warps": 8, "num_stages": 2},
    },
    "far_backward": {
        128: {"COLUMNS": 32, "KEYS": 64, "num_warps": 8, "num_stages": 2},
        256: {"COLUMNS": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
    },
    "key_gradients": {
        128: {"QUERIES": 64, "A": 64, "SUMMARY_STAGES": 1, "num_warps": 4, "num_stages": 2},
        256: {"QUERIES": 32, "A": 32, "SUMMARY_STAGES": 1, "num_warps": 4, "num_stages": 2},
    },
}


def tile_of(kernel: str, operand: Tensor) -> Tile:
    """Constants and launch options of a kernel for operands [..., D], D padded or not, on their device."""
    return dict(_tile(kernel, _row_bytes(operand), shared_memory(operand.get_device())))


def fits(operand: Tensor) -> bool:
    """Whether the operand's device has the memory that kernels need for operands [..., D], D padded or not."""
    row_bytes, device_index = _row_bytes(operand), operand.get_device()
    if device_index < 0 or row_bytes <= LARGEST_ROW:
        return True
    return row_bytes <= LARGEST_ROW_HOPPER and torch.cuda.get_device_capability(device_index) == (9, 0)


@functools.cache
def shared_memory(device_index: int) -> int:
    """Bytes that one block may have; the interpreter (device -1) has no limit."""
    if device_index < 0:
        return LARGE
    properties = torch.cuda.get_device_properties(device_index)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _row_bytes(operand: Tensor) -> int:
    return padded_head_dim(operand.shape[-1]) * operand.element_size()


@functools.cache
def _tile(kernel: str, row_bytes: int, shared_memory: int) -> Tile:
    tiles = (_LARGE if shared_memory >= LARGE else _SMALL)[kernel]
    return tiles[max((least for least in tiles if least <= row_bytes), default=min(tiles))]
