"""Every strategy on a CUDA device, in the precision that it trains in."""

from typing import Any

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import AttentionStrategy, Dense, Muse, SlidingWindow, SpatialBlocks
from tests.assertions import assert_as_accurate

pytestmark = pytest.mark.gpu

MUSE = {"chunk": 64, "query_cluster": 16, "key_cluster": 16, "top_k": 2, "exact_below": 0}
STRATEGIES = [Dense(0), Muse(0, **MUSE), SpatialBlocks(0, **MUSE), SlidingWindow(0, window=50)]
CU_SEQLENS = torch.tensor([0, 250, 300, 301, 301, 600] + [600] * 59, dtype=torch.int32)
"""Two rows of 300 tokens."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["rows", "documents"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("head_dim", [4, 32, 64, 128])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_forward_and_gradients_are_as_accurate_as_on_the_cpu(
    strategy: AttentionStrategy, head_dim: int, kv_heads: int, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> None:
    qkv = [torch.randn(2, heads, 300, head_dim).to(dtype) for heads in (4, kv_heads, kv_heads)]
    dout = torch.randn(2, 4, 300, head_dim).to(dtype)

    def run(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(device, dtype).requires_grad_() for x in qkv]
        options: dict[str, Any] = {"cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(device)}
        out = strategy(*inputs, softmax_scale=head_dim**-0.5, **options)
        return (out.detach(), *torch.autograd.grad(out, inputs, dout.to(device, dtype)))

    results = zip(run("cuda", dtype), run("cpu", torch.float64), run("cpu", dtype), strict=True)
    for name, (actual, exact, baseline) in zip(("out", "dq", "dk", "dv"), results, strict=True):
        # FlashAttention rounds the weights to the working dtype before the product with v; the CPU kernels do not.
        assert_as_accurate(actual, exact=exact, baseline=baseline, multiple=4.0, name=name)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3000, 3000, 8192]], ids=["rows", "documents"])
@pytest.mark.parametrize("strategy", [Dense(0), Muse(0, exact_below=0), SlidingWindow(0)], ids=repr)
def test_gradients_are_the_same_bits_when_determinism_is_asked_for(
    strategy: AttentionStrategy, cu_seqlens: list[int] | None
) -> None:
    qkv = [torch.randn(1, 8, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    dout = torch.randn_like(qkv[0])
    documents = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(strategy(*qkv, softmax_scale=0.125, cu_seqlens=documents), qkv, dout) for _ in range(4)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))
