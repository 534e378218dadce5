"""The operator by kernels at real sizes: no host reads, CUDA graphs, nothing compiled twice, memory, error."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.assertions import relative_error
from tests.kernels.attention.inputs import exact
from tests.kernels.attention.test_error import ACTIVATIONS, MEASURED, TOLERANCE
from tests.kernels.attention.test_streaming import LIMITS, assert_kernels_agree, make_qkv, name, results

pytestmark = pytest.mark.gpu

KERNELS: dict[str, Any] = {"implementation": "triton"}
"""And defaults: chunks of 2,048, clusters of 128 and 64."""

DEFAULT_SIZES: dict[str, Any] = {"chunk": 2048, "query_cluster": 128, "key_cluster": 64, "top_k": 12, "exact_below": 0}
WORKSPACE_MIB = 1024
LABELS = ("out", "lse", "dq", "dk", "dv")
QKV = tuple[Tensor, Tensor, Tensor]


def cumulative(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


def inputs(num_tokens: int, device: torch.device, **options: Any) -> tuple[QKV, Tensor]:
    """q, k, v and dout."""
    options = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16, **options}
    qkv = make_qkv(num_tokens, device, **options)
    return qkv, torch.randn(qkv[0].shape).to(qkv[0])


def assert_within(limit: float, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    errors = {
        label: relative_error(found, wanted) for label, found, wanted in zip(LABELS, actual, expected, strict=True)
    }
    assert all(error <= limit for error in errors.values()), f"{errors}, accepted up to {limit}"


# ------------------------------------------------------------------------------------------- host reads, CUDA graphs


@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
def test_nothing_is_read_on_the_host(with_documents: bool, device: torch.device) -> None:
    """After one run, in which plans and kernels are made."""
    qkv, dout = inputs(12_288, device)
    options = {**KERNELS, "cu_seqlens": cumulative(0, 300, 9_000, 12_288, 12_288) if with_documents else None}
    options["exact_below"] = 1_000
    results(qkv, dout, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(qkv, dout, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
def test_a_graph_replays_with_new_inputs(with_documents: bool, device: torch.device) -> None:
    """Boundaries of documents are inputs as well."""
    qkv, dout = inputs(12_288, device)
    cu_seqlens = cumulative(0, 300, 9_000, 12_288, 12_288) if with_documents else None
    options = {**KERNELS, "cu_seqlens": cu_seqlens, "exact_below": 1_000}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            results(qkv, dout, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(qkv, dout, **options)

    for x in (*qkv, dout):
        x.copy_(2 * torch.randn_like(x))
    if cu_seqlens is not None:
        cu_seqlens.copy_(cumulative(0, 5_000, 5_000, 5_001, 12_288))
    graph.replay()
    torch.cuda.synchronize()
    assert_within(LIMITS[torch.bfloat16], captured, results(qkv, dout, **options))


# ------------------------------------------------------------------------------------------------------- compilation


def test_a_length_compiles_nothing_new(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do a number of documents, and a workspace that holds some heads or rows only."""
    compiled: list[str] = []

    def record(**what: Any) -> None:
        compiled.append(what["repr"])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", record)
    sizes = {"heads": 6, "kv_heads": 2, "head_dim": 32}  # as in no other test, so that the first run compiles

    def run(num_tokens: int, **options: Any) -> None:
        qkv, dout = inputs(num_tokens, device, **sizes)
        results(qkv, dout, **KERNELS, **options)

    run(15_000)
    assert any("muse_far_backward" in kernel for kernel in compiled)
    compiled.clear()
    for num_tokens in (15_000, 16_384, 20_001, 33_000):
        run(num_tokens)
        run(num_tokens, workspace_mib=16)
        run(num_tokens, cu_seqlens=cumulative(0, 14_500, num_tokens))
        run(num_tokens, cu_seqlens=cumulative(0, 1, 1, 70, num_tokens, num_tokens))
    assert compiled == []


# ------------------------------------------------------------------------------------------------------------ memory


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes at the peak, beyond what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def large_inputs(num_tokens: int, device: torch.device) -> tuple[QKV, Tensor]:
    """Made on the device: 16 heads of 128 in bfloat16."""
    q, k, v, dout = (torch.randn(1, 16, num_tokens, 128, dtype=torch.bfloat16, device=device) for _ in range(4))
    return (q, k, v), dout


def test_memory_is_that_of_exact_attention_and_the_workspace(device: torch.device) -> None:
    qkv, dout = large_inputs(65_536, device)

    def exactly() -> tuple[Tensor, ...]:
        q, k, v = leaves = [x.detach().requires_grad_() for x in qkv]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out, *torch.autograd.grad(out, leaves, dout)

    dense, muse = peak_memory(exactly), peak_memory(partial(results, qkv, dout, **KERNELS))
    workspace = WORKSPACE_MIB * 2**20
    assert muse <= dense + workspace, f"{muse / 2**30:.2f} GiB, cuDNN {dense / 2**30:.2f} GiB"


def test_memory_grows_with_the_length_and_no_faster(device: torch.device) -> None:
    """The workspace stays what it is, so twice the tokens take less than twice the memory."""
    peaks = []
    for num_tokens in (65_536, 131_072):
        qkv, dout = large_inputs(num_tokens, device)
        peaks.append(peak_memory(partial(results, qkv, dout, **KERNELS)))
        del qkv, dout
    assert peaks[1] <= 2 * peaks[0], [f"{peak / 2**30:.2f} GiB" for peak in peaks]


# ------------------------------------------------------------------------------------------------------------- error


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_and_gradients_at_real_sizes(
    dtype: torch.dtype, head_dim: int, kv_heads: int, device: torch.device
) -> None:
    qkv, _ = inputs(9_000, device, heads=8, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    assert_kernels_agree(qkv, **DEFAULT_SIZES)


@pytest.mark.parametrize("options", [{"causal": False}, {"order": 0}, {"top_k": 0}, {"workspace_mib": 8}], ids=name)
def test_options_at_real_sizes(options: dict[str, Any], device: torch.device) -> None:
    qkv, _ = inputs(9_000, device)
    assert_kernels_agree(qkv, **{**DEFAULT_SIZES, **options})


def test_documents_at_real_sizes(device: torch.device) -> None:
    qkv, _ = inputs(20_000, device)
    cu_seqlens = cumulative(0, 0, 1, 2_049, 6_145, 6_150, 8_000, 20_000, 20_000)
    assert_kernels_agree(qkv, cu_seqlens, **{**DEFAULT_SIZES, "exact_below": 2_048})


def test_rows_of_the_chunk_table_that_no_document_takes(device: torch.device) -> None:
    """Nothing is out of bounds where every document is exact but a longer one would have had clusters."""
    qkv, dout = inputs(40_000, device)
    cu_seqlens = cumulative(*range(0, 40_001, 4_000), *[40_000] * 53)
    out, _, *gradients = results(qkv, dout, cu_seqlens=cu_seqlens, **KERNELS)
    q, k, v = leaves = [x.detach().float().requires_grad_() for x in qkv]
    twin = exact(q, k, v, cu_seqlens=cu_seqlens)
    expected = torch.autograd.grad(twin, leaves, dout.float())
    assert_within(LIMITS[torch.bfloat16], (out, out, *gradients), (twin, twin, *expected))


@pytest.mark.parametrize("head", ["layer1_head3", "layer6_head10"])
@pytest.mark.parametrize("options", [{}, *(options for options, _, _ in MEASURED)], ids=name)
def test_the_error_against_exact_attention_is_the_reference_s(
    options: dict[str, Any], head: str, device: torch.device
) -> None:
    """On recorded activations, 16,384 tokens: the kernels choose clusters of their own, in bfloat16."""
    q, k, v = torch.load(ACTIVATIONS / f"{head}.pt", weights_only=True).to(device)[:, None, None]
    assert q.dtype == torch.bfloat16
    no_gradient = torch.zeros_like(q)
    out, *_ = results((q, k, v), no_gradient, **KERNELS, **options)
    q, k, v = q.float(), k.float(), v.float()
    twin, *_ = results((q, k, v), no_gradient.float(), implementation="reference", **options)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    found, wanted = (relative_error(x, dense) ** 2 for x in (out, twin))
    assert found == pytest.approx(wanted, rel=TOLERANCE)
