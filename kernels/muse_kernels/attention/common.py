"""What several kernels share."""

import math

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Kernels run in Triton's interpreter, on a CPU."""

LOG2E = tl.constexpr(math.log2(math.e))
"""Logits inside kernels count in powers of two: exp2 is what the hardware has."""

NEGATIVE = tl.constexpr(-1.0e38)
"""A running maximum starts here, not at -inf: -inf - -inf is NaN."""


@triton.jit
def operand(x):
    """A tile as it goes into arithmetic. The interpreter's own bf16 arithmetic is wrong (triton issue 11584)."""
    if INTERPRETED:
        return x.to(tl.float32)
    return x


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: the power of two that holds `head_dim`, at least 16 (the least a matrix unit takes)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied if the elements of one token are not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()
