"""The whole operator: exact limits, gradients, documents, clusters, dtypes, argument checks."""

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_kernels import muse_attention, muse_clusters
from muse_kernels.attention import op
from muse_kernels.attention.options import MuseOptions
from tests.kernels.attention.inputs import exact, random_qkv

SMALL = {"chunk": 8, "query_cluster": 4, "key_cluster": 2, "top_k": 2, "exact_below": 0}
"""Several chunks and clusters within a few dozen tokens."""

CU_SEQLENS = torch.tensor([0, 0, 20, 21, 21, 29, 45, 45, 45], dtype=torch.int32)
"""Empty documents, one of one token, one of exactly a chunk, ragged ones, padding at the end."""

ALL_OPTIONS = [
    {},
    {"causal": False},
    {"order": 0},
    {"top_k": 0},
    {"selection": "centroid"},
    {"summary_cluster": 2},
    {"summary_cluster": 4, "causal": False},
    {"candidates": 3},
    {"expansion": "zero"},
    {"expansion": "zero", "selection": "centroid", "causal": False},
    {"query_clustering": "spatial"},
    {"key_clustering": "spatial"},
    {"query_clustering": "spatial", "key_clustering": "spatial", "expansion": "zero"},
]

EXACT_LIMITS: list[dict[str, Any]] = [
    {"key_cluster": 1, "summary_cluster": 1},
    {"top_k": 1000},
    {"top_k": 1000, "order": 0},
    {"top_k": 1000, "expansion": "zero"},
    {"exact_below": 1000},
]


def name(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items()) or "default"


def assert_equal_with_gradients(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    dout = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(out, inputs, dout, retain_graph=True) for out in (actual, expected))
    for label, found, wanted in zip("qkv", *gradients, strict=False):
        torch.testing.assert_close(found, wanted, msg=lambda m, label=label: f"d{label}: {m}")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["one document", "documents"])
@pytest.mark.parametrize("options", EXACT_LIMITS, ids=name)
def test_in_the_exact_limits_it_is_softmax_attention(
    options: dict[str, Any], cu_seqlens: Tensor | None, causal: bool, kv_heads: int
) -> None:
    qkv = random_qkv(45, batch=1 if cu_seqlens is not None else 2, heads=4, kv_heads=kv_heads)
    out = muse_attention(*qkv, causal=causal, cu_seqlens=cu_seqlens, **{**SMALL, **options})
    assert_equal_with_gradients(out, exact(*qkv, causal=causal, cu_seqlens=cu_seqlens), qkv)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_one_query_per_cluster_is_exact_but_for_dq(causal: bool) -> None:
    q, k, v = random_qkv(45)
    out = muse_attention(q, k, v, causal=causal, **{**SMALL, "query_cluster": 1, "key_cluster": 4})
    assert_equal_with_gradients(out, exact(q, k, v, causal=causal), (k, v))


def test_beyond_the_limits_it_is_not_exact() -> None:
    """So that the limits above are limits: each option that was left out of them changes the result."""
    qkv = random_qkv(45)
    results = [muse_attention(*qkv, **{**SMALL, **options}) for options in ALL_OPTIONS]
    results.append(exact(*qkv))
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert (first - second).abs().max() > 1e-6


def check_gradient_with_clusters_held(q: Tensor, k: Tensor, v: Tensor, *, fast: bool, **options: Any) -> None:
    clusters = muse_clusters(q, k, **options)
    torch.autograd.gradcheck(lambda *qkv: muse_attention(*qkv, clusters=clusters, **options), (q, k, v), fast_mode=fast)


@pytest.mark.parametrize("order", [0, 1])
def test_every_element_of_the_gradient_with_clusters_held(order: int) -> None:
    check_gradient_with_clusters_held(*random_qkv(11, heads=1), fast=False, **{**SMALL, "chunk": 4, "order": order})


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 45])
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_gradient_with_clusters_held(options: dict[str, Any], num_tokens: int) -> None:
    check_gradient_with_clusters_held(*random_qkv(num_tokens), fast=True, **{**SMALL, **options})


@pytest.mark.parametrize("order", [0, 1])
def test_gradient_with_documents_and_grouped_heads(order: int) -> None:
    options = {**SMALL, "order": order, "cu_seqlens": CU_SEQLENS, "exact_below": 8}
    check_gradient_with_clusters_held(*random_qkv(45, heads=4, kv_heads=2), fast=True, **options)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_documents_are_attended_apart(options: dict[str, Any]) -> None:
    options = {**SMALL, "exact_below": 10, **options}
    qkv = random_qkv(45, kv_heads=2)
    packed = muse_attention(*qkv, cu_seqlens=CU_SEQLENS, **options)
    slices = [slice(0, 20), slice(20, 21), slice(21, 29), slice(29, 45)]
    apart = torch.cat([muse_attention(*(x[:, :, s] for x in qkv), **options) for s in slices], dim=2)
    assert_equal_with_gradients(packed, apart, qkv)


def test_rows_of_a_batch_are_attended_apart() -> None:
    qkv = random_qkv(45, batch=3)
    apart = torch.cat([muse_attention(*(x[i : i + 1] for x in qkv), **SMALL) for i in range(3)])
    assert_equal_with_gradients(muse_attention(*qkv, **SMALL), apart, qkv)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"order": 0}], ids=name)
@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["one document", "documents"])
def test_a_bounded_workspace_changes_nothing(options: dict[str, Any], cu_seqlens: Tensor | None) -> None:
    qkv = random_qkv(45, head_dim=256)
    options = {**SMALL, **options, "cu_seqlens": cu_seqlens}
    roomy, tight = (muse_attention(*qkv, workspace_mib=mib, **options) for mib in (1024, 1))
    assert_equal_with_gradients(tight, roomy, qkv)


@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["one document", "documents"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_clusters_are_reused_bit_for_bit_and_have_a_static_shape(causal: bool, cu_seqlens: Tensor | None) -> None:
    q, k, v = random_qkv(45, heads=4, kv_heads=2)
    options = {**SMALL, "causal": causal, "cu_seqlens": cu_seqlens}
    clusters = muse_clusters(q, k, **options)
    rows = 6 if cu_seqlens is None else 45 // 8 + len(cu_seqlens) - 1
    assert [tuple(x.shape) for x in clusters] == [
        (1, 4, rows, 8),
        (1, 2, rows, 8),
        (1, 4, rows, 2, 4),
        (1, 4, rows, 2, 2),
    ]
    torch.testing.assert_close(
        muse_attention(q, k, v, clusters=clusters, **options), muse_attention(q, k, v, **options), rtol=0, atol=0
    )
    for order in (clusters.query_order, clusters.key_order):
        for head in order.flatten(2)[0]:
            assert head[head >= 0].sort().values.tolist() == list(range(45))
        first, second = order.unflatten(-1, (-1, 2)).unbind(-1)  # key clusters: halves of query clusters
        assert ((first < second) | (second == -1)).all()
    chunk_of_row = torch.full((rows * 4,), -1)
    filled = (clusters.key_order[0, 0] >= 0).view(rows * 4, 2).any(-1)
    chunk_of_row[filled] = filled.nonzero().flatten() // 4
    for row, selected in enumerate(clusters.selected[0, 0]):
        chosen = chunk_of_row[selected[selected >= 0].long()]
        assert (chosen >= 0).all()
        assert ((chosen < row) if causal else (chosen != row)).all()


@pytest.mark.parametrize("selection", ["peak_mass", "centroid"])
def test_a_cluster_without_queries_retrieves_nothing(selection: str) -> None:
    q, k, _ = random_qkv(18)  # two tokens in the last chunk: its first cluster is half full, its second empty
    selected = muse_clusters(q, k, selection=selection, **SMALL).selected[0, 0]
    assert (selected[2, 0] >= 0).all()
    assert (selected[2, 1] == -1).all()


@pytest.mark.parametrize("top_k", [0, 2])
def test_without_first_order_the_size_of_summaries_makes_no_difference(top_k: int) -> None:
    """A summary of order 0 weighs what its keys weigh: sums of exp(A) vbar, however keys are grouped."""
    qkv = tuple(torch.randn(1, 2, 45, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, 2, 45, 4, dtype=torch.float64)
    first, *others = (
        (out := muse_attention(*qkv, **SMALL, order=0, summary_cluster=size), *torch.autograd.grad(out, qkv, dout))
        for size in (2, 4, 8)
    )
    for other in others:
        torch.testing.assert_close(other, first)


@pytest.mark.parametrize(("has_documents", "chunks"), [(False, 7), (True, 2)])
def test_packed_documents_are_exact_up_to_fewer_tokens_by_default(has_documents: bool, chunks: int) -> None:
    options = {**SMALL, "exact_below": None}
    for num_tokens, is_exact in ((8 * chunks, True), (8 * chunks + 1, False)):
        qkv = tuple(torch.randn(1, 2, num_tokens, 4, dtype=torch.float64) for _ in range(3))
        cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32) if has_documents else None
        error = muse_attention(*qkv, cu_seqlens=cu_seqlens, **options) - exact(*qkv)
        assert (error.abs().max() < 1e-9) == is_exact


@pytest.mark.parametrize(("exact_below", "is_exact"), [(44, False), (45, True), (46, True)])
def test_exact_below_includes_its_own_length(exact_below: int, is_exact: bool) -> None:
    qkv = random_qkv(45)
    error = muse_attention(*qkv, **{**SMALL, "exact_below": exact_below}) - exact(*qkv)
    assert (error.abs().max() < 1e-12) == is_exact


@pytest.mark.parametrize("order", [0, 1])
def test_enormous_inputs_stay_finite(order: int) -> None:
    """Also where the last chunk is partial: empty places have no logit that could overflow."""
    qkv = tuple((1e4 * x.detach().float()).requires_grad_() for x in random_qkv(18))
    out = muse_attention(*qkv, **{**SMALL, "order": order})
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out, qkv, torch.ones_like(out)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mu_is_the_mean_of_its_clusters_queries_as_their_dtype_holds_it(dtype: torch.dtype) -> None:
    q, k, _ = (x.detach() for x in random_qkv(16, dtype=dtype))
    clusters = muse_clusters(q, k, **SMALL)
    members = q[0, 0, clusters.query_order[0, 0, 1, :4].long()]
    mean = members.to(clusters.mu.dtype).mean(0)
    assert clusters.mu.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(clusters.mu[0, 0, 1, 0], mean.to(dtype).to(mean.dtype))


@pytest.mark.parametrize(
    ("cu_seqlens", "exact_below", "rows", "lengths"),
    [
        (None, 45, 0, []),
        (None, 44, 6, [8, 8, 8, 8, 8, 5]),
        (CU_SEQLENS, 15, 5 + 2, [8, 8, 4, 8, 8]),  # documents of 20 and 16 tokens
        (CU_SEQLENS, 8, 5 + 5, [8, 8, 4, 8, 8]),
        (CU_SEQLENS, 7, 5 + 5, [8, 8, 4, 8, 8, 8]),
        (CU_SEQLENS, 45, 5, []),
        (CU_SEQLENS, 0, 5 + 8, [8, 8, 4, 1, 8, 8, 8]),
    ],
)
def test_exact_documents_have_no_clusters(
    cu_seqlens: Tensor | None, exact_below: int, rows: int, lengths: list[int]
) -> None:
    q, k, _ = random_qkv(45, heads=4, kv_heads=2)
    clusters = muse_clusters(q, k, cu_seqlens=cu_seqlens, **{**SMALL, "exact_below": exact_below})
    for x in clusters:
        assert x.shape[2] == rows
    found = (clusters.query_order[0, 0] >= 0).sum(-1).tolist()
    assert found == lengths + [0] * (rows - len(lengths))
    for unused in (clusters.query_order, clusters.key_order, clusters.selected):
        assert (unused[:, :, len(lengths) :] == -1).all()
    assert (clusters.mu[:, :, len(lengths) :] == 0).all()


def test_as_many_long_documents_as_there_can_be_find_room() -> None:
    cu_seqlens = torch.arange(0, 46, 9, dtype=torch.int32)  # five documents of 9 tokens, two chunks each
    qkv = random_qkv(45, kv_heads=2)
    options = {**SMALL, "exact_below": 8}
    assert muse_clusters(*qkv[:2], cu_seqlens=cu_seqlens, **options).mu.shape[2] == 10
    packed = muse_attention(*qkv, cu_seqlens=cu_seqlens, **options)
    apart = torch.cat([muse_attention(*(x[:, :, i : i + 9] for x in qkv), **options) for i in range(0, 45, 9)], dim=2)
    torch.testing.assert_close(packed, apart)


def test_lse_is_that_of_exact_attention_or_less() -> None:
    q, k, v = random_qkv(45)
    _, lse = muse_attention(q, k, v, return_lse=True, **SMALL)
    logits = (q @ k.mT / 2).masked_fill(~torch.ones(45, 45).tril().bool(), -torch.inf)
    true = logits.logsumexp(-1)
    assert lse.shape == (1, 2, 45)
    assert not lse.requires_grad
    torch.testing.assert_close(lse[:, :, :8], true[:, :, :8].detach())
    assert (lse <= true + 1e-12).all()
    assert (lse < true - 1e-4).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_costs_one_rounding(dtype: torch.dtype) -> None:
    """Statistics are float32: an output is off by its own rounding, gradients also by that of out in delta."""
    exact_inputs = tuple(x.detach().to(dtype).double().requires_grad_() for x in random_qkv(64, head_dim=16))
    inputs = tuple(x.detach().to(dtype).requires_grad_() for x in exact_inputs)
    options = {**SMALL, "clusters": None}
    options["clusters"] = muse_clusters(*exact_inputs[:2], **SMALL)
    expected = muse_attention(*exact_inputs, **options)
    options["clusters"] = options["clusters"]._replace(mu=options["clusters"].mu.float())
    out, lse = muse_attention(*inputs, return_lse=True, **options)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # In float32 the sums over some dozen terms round as well.
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps, atol=2 * eps)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dout)
    wanted = torch.autograd.grad(expected, exact_inputs, dout.double())
    for found, want in zip(gradients, wanted, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=8 * eps, atol=8 * eps)


def test_autocast_computes_in_its_dtype_as_sdpa_does() -> None:
    qkv = random_qkv(45, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, twin = muse_attention(*qkv, **{**SMALL, "top_k": 99}), exact(*qkv)
    assert out.dtype == twin.dtype == torch.bfloat16
    torch.testing.assert_close(out, twin, rtol=0.01, atol=0.01)


def test_autocast_casts_what_has_different_dtypes() -> None:
    """As after rotary embeddings, which leave q and k in float32."""
    q, k, v = random_qkv(45, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, cast = (muse_attention(q, k, x, **SMALL) for x in (v.bfloat16(), v))
    assert mixed.dtype is torch.bfloat16
    assert torch.equal(mixed, cast)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"softmax_scale": 0.3}], ids=name)
def test_exact_rows_go_to_the_library_whole(
    options: dict[str, Any], kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The route that a GPU takes, forced on a CPU: the operator itself must not be needed, nor its result differ."""
    qkv = random_qkv(45, heads=4, kv_heads=kv_heads)
    expected = muse_attention(*qkv, **options)
    monkeypatch.setattr(op, "_is_for_library", lambda *_: True)
    monkeypatch.setattr(op, "_attend", None)
    out = muse_attention(*qkv, **options)
    assert isinstance(out, Tensor)
    assert out.is_contiguous()
    assert isinstance(expected, Tensor)
    assert_equal_with_gradients(out, expected, qkv)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_exact_rows_on_a_gpu(kv_heads: int, dtype: torch.dtype) -> None:
    leaves = random_qkv(300, heads=4, kv_heads=kv_heads, head_dim=64, dtype=dtype, device="cuda")
    out = muse_attention(*leaves)
    assert isinstance(out, Tensor)
    dout, wide = torch.randn_like(out), tuple(x.detach().double().requires_grad_() for x in leaves)
    true = exact(*wide)
    limit = 2e-2 if dtype is torch.bfloat16 else 1e-5
    found = (out, *torch.autograd.grad(out, leaves, dout))
    wanted = (true, *torch.autograd.grad(true, wide, dout.double()))
    for x, y in zip(found, wanted, strict=True):
        assert (x.double() - y).norm() <= limit * y.norm()


def test_strides_do_not_matter() -> None:
    qkv = tuple(torch.randn(1, 45, 2, 4).transpose(1, 2).requires_grad_() for _ in range(3))
    contiguous = tuple(x.detach().contiguous().requires_grad_() for x in qkv)
    out, twin = muse_attention(*qkv, **SMALL), muse_attention(*contiguous, **SMALL)
    torch.testing.assert_close(out, twin, rtol=0, atol=0)
    dout = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(twin, contiguous, dout))


def test_inputs_are_not_changed_and_repeats_are_equal() -> None:
    qkv = random_qkv(45)
    before = [x.detach().clone() for x in qkv]
    first, second = (muse_attention(*qkv, **SMALL) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for x, copy in zip(qkv, before, strict=True):
        torch.testing.assert_close(x.detach(), copy, rtol=0, atol=0)


@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["one document", "documents"])
def test_the_operator_is_registered_soundly(cu_seqlens: Tensor | None) -> None:
    q, k, v = random_qkv(45)
    options = MuseOptions(**SMALL).resolved(head_dim=4).encoded()
    torch.library.opcheck(torch.ops.muse.attention_forward, (q, k, v, cu_seqlens, None, None, None, None, options))
    clusters = muse_clusters(q, k, cu_seqlens=cu_seqlens, **SMALL)
    torch.library.opcheck(torch.ops.muse.attention_forward, (q, k, v, cu_seqlens, *clusters, options))
    out, lse = muse_attention(q, k, v, cu_seqlens=cu_seqlens, return_lse=True, **SMALL)
    detached = [x.detach() for x in (out, q, k, v, out)]
    torch.library.opcheck(torch.ops.muse.attention_backward, (*detached, lse, cu_seqlens, *clusters, options))


def test_torch_compile_sees_one_graph() -> None:
    qkv = random_qkv(45)
    compiled = torch.compile(lambda q, k, v: muse_attention(q, k, v, **SMALL) * 2, backend="aot_eager", fullgraph=True)
    assert_equal_with_gradients(compiled(*qkv), muse_attention(*qkv, **SMALL) * 2, qkv)


def test_defaults_are_those_of_the_options() -> None:
    defaults = {n: p.default for n, p in inspect.signature(muse_attention).parameters.items()}
    for field in dataclasses.fields(MuseOptions):
        assert defaults[field.name] == field.default, field.name


Q, KV = torch.zeros(1, 4, 16, 8), torch.zeros(1, 2, 16, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q[0], KV, KV), {}, r"q must be \[batch, heads, tokens, head_dim\], got shape \[4, 16, 8\]"),
        ((Q, KV, KV[:, :, :8]), {}, r"k and v must have the same shape, got \[1, 2, 16, 8\] and \[1, 2, 8, 8\]"),
        ((Q, KV[:, :, :8], KV[:, :, :8]), {}, "q and k must agree in all but heads"),
        ((Q[:, :3], KV, KV), {}, "heads of q must be a multiple of heads of k, got 3 and 2"),
        (
            (Q, KV.half(), KV),
            {},
            "share one floating-point dtype and one device, got q torch.float32 .* k torch.float16",
        ),
        ((Q.int(), KV.int(), KV.int()), {}, "floating-point dtype"),
        ((Q, KV, KV), {"chunk": 96, "query_cluster": 32}, "chunk / query_cluster must be a power of two, got chunk=96"),
        ((Q, KV, KV), {"key_cluster": 0}, "key_cluster=0"),
        *(
            (
                (Q, KV, KV),
                {"chunk": 16, "query_cluster": 8, "key_cluster": 4, "summary_cluster": size},
                f"summary_cluster must be one of 4, 8, 16 for chunk=16, key_cluster=4, got {size}",
            )
            for size in (0, 2, 12, 32)
        ),
        ((Q, KV, KV), {"top_k": -1}, "top_k must be at least 0, got -1"),
        ((Q, KV, KV), {"exact_below": -1}, "exact_below must be at least 0, got -1"),
        ((Q, KV, KV), {"workspace_mib": 0}, "workspace_mib must be at least 1, got 0"),
        ((Q, KV, KV), {"order": 2}, "order must be 0 or 1, got 2"),
        ((Q, KV, KV), {"selection": "best"}, "selection must be one of peak_mass, centroid, got 'best'"),
        ((Q, KV, KV), {"implementation": "cuda"}, "implementation must be one of auto, triton, reference, got 'cuda'"),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([0, 16])}, r"cu_seqlens must be int32 \[S \+ 1\], got torch.int64"),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([0, 9, 8, 16], dtype=torch.int32)}, "must rise from 0 to"),
        ((Q, KV, KV), {"cu_seqlens": torch.tensor([0, 15], dtype=torch.int32)}, "must rise from 0 to .* 16, got"),
        ((Q.repeat(2, 1, 1, 1),) + (KV.repeat(2, 1, 1, 1),) * 2, {"cu_seqlens": CU_SEQLENS}, "the batch must be 1"),
        (
            (Q, KV, KV),
            {"clusters": (Q, Q, Q, Q), "exact_below": 0},
            r"clusters.query_order must be torch.int32 \[1, 4, 1, 2048\]",
        ),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[Tensor, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        muse_attention(*arguments, **options)
