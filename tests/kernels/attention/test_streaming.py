"""The operator by kernels, held to the reference with the same clusters: interpreted on a CPU, compiled on a GPU.

The reference in float64 is exact. What the kernels may miss it by is stated per dtype: they round each intermediate
tile (weights, summaries) to the dtype that matrix units multiply, where the reference rounds its result alone.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from muse_kernels import muse_attention, muse_clusters
from tests.assertions import relative_error

SMALL = {"chunk": 64, "query_cluster": 16, "key_cluster": 16, "top_k": 2, "exact_below": 0}
"""The least that kernels accept, so that a few hundred tokens are several chunks of several clusters."""

CU_SEQLENS = [0, 0, 70, 71, 71, 100, 228, 230, 300, 300]
"""Empty documents, one of one token, one of exactly two chunks, ragged ones, padding at the end."""

# Relative error in the Frobenius norm, over float64. float32: sums of some hundred terms. float16 and bfloat16: about
# two roundings of eps / 2, in quadrature, on top of the result's own.
LIMITS = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
"""The interpreter's bfloat16 truncates instead of rounding (triton issue 11584)."""


def name(value: Any) -> str:
    return " ".join(f"{key}={item}" for key, item in value.items()) or "default"


def make_qkv(
    num_tokens: int,
    device: torch.device,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a spread of about 2, so that some clusters matter and others do not."""
    shapes = [(batch, n, num_tokens, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    return (2 * q).to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def results(
    qkv: tuple[Tensor, Tensor, Tensor], dout: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out, lse = muse_attention(*leaves, return_lse=True, **options)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, dout)


def assert_kernels_agree(
    qkv: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor | None = None,
    *,
    limit: float | None = None,
    **options: Any,
) -> None:
    """Clusters are the reference's, chosen in the inputs' dtype, for both."""
    options = {**SMALL, **options, "cu_seqlens": cu_seqlens}
    clusters = muse_clusters(*qkv[:2], implementation="reference", **options)
    dout = torch.randn_like(qkv[0])
    wide = clusters._replace(mu=clusters.mu.double())
    expected = results(
        tuple(x.double() for x in qkv),
        dout.double(),
        clusters=wide,
        implementation="reference",
        **options,
    )
    actual = results(qkv, dout, clusters=clusters, implementation="triton", **options)
    limit = limit or LIMITS[qkv[0].dtype]
    errors = {
        label: relative_error(found, wanted)
        for label, found, wanted in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True)
    }
    assert all(error <= limit for error in errors.values()), f"{errors}, accepted up to {limit}"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"order": 0},
    {"order": 0, "causal": False},
    {"top_k": 0},
    {"top_k": 1000},
    {"top_k": 5, "causal": False},
    {"expansion": "zero"},
    {"summary_cluster": 16},
    {"summary_cluster": 32, "causal": False},
    {"query_cluster": 32, "key_cluster": 64},
    {"query_cluster": 64, "key_cluster": 32, "top_k": 3},
    {"query_clustering": "spatial", "key_clustering": "spatial"},
    {"softmax_scale": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_forward_and_gradients(options: dict[str, Any], device: torch.device) -> None:
    assert_kernels_agree(make_qkv(200, device), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"order": 0, "causal": False}], ids=name)
def test_dtypes(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    assert_kernels_agree(make_qkv(200, device, dtype=dtype, head_dim=32), **options)


@pytest.mark.parametrize("num_tokens", [65, 64, 128, 129, 191])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_lengths(causal: bool, num_tokens: int, device: torch.device) -> None:
    assert_kernels_agree(make_qkv(num_tokens, device), causal=causal)


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 96, 128, 256])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    # On a GPU, the largest heads are too wide in float32.
    dtype = torch.bfloat16 if head_dim > 128 and device.type == "cuda" else torch.float32
    assert_kernels_agree(make_qkv(140, device, head_dim=head_dim, heads=1, dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (8, 1)])
def test_grouped_heads_and_batch(heads: int, kv_heads: int, device: torch.device) -> None:
    assert_kernels_agree(make_qkv(100, device, batch=2, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"exact_below": 64}, {"exact_below": 80}], ids=name)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_documents(kv_heads: int, options: dict[str, Any], device: torch.device) -> None:
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=device)
    assert_kernels_agree(make_qkv(300, device, kv_heads=kv_heads), cu_seqlens, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_cluster": 256, "chunk": 256}, "accepts query_cluster 16, 32, 64, 128, got 256"),
        ({"key_cluster": 8}, "accepts key_cluster 16, 32, 64, got 8"),
        (
            {"chunk": 1024, "summary_cluster": 1024},
            "accepts summary_cluster up to 512 with key_cluster 16, got 1024",
        ),
        ({"candidates": 65}, "accepts candidates up to 64, got 65"),
        ({"chunk": 16384}, "accepts chunk up to 8192, got 16384"),
    ],
    ids=str,
)
def test_what_kernels_do_not_take_is_named(options: dict[str, Any], message: str, device: torch.device) -> None:
    """And "auto" takes plain PyTorch for it."""
    qkv = make_qkv(70, device)
    with pytest.raises(ValueError, match=f'implementation="triton" {message}'):
        muse_attention(*qkv, implementation="triton", **{**SMALL, **options})
    muse_attention(*qkv, **{**SMALL, **options})


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 16), (torch.float32, 257)], ids=str)
def test_tensors_that_kernels_do_not_take_are_named(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    qkv = make_qkv(70, device, dtype=dtype, head_dim=head_dim)
    with pytest.raises(
        ValueError, match=r"accepts (float32, float16 and bfloat16, got torch.float64|head_dim up to 256)"
    ):
        muse_attention(*qkv, implementation="triton", **SMALL)


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs a CUDA device .* got cpu"):
        muse_attention(*make_qkv(70, torch.device("cpu")), implementation="triton", **SMALL)
