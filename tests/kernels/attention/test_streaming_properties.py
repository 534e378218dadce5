"""What must hold for the operator by kernels, whatever the reference says: interpreted on a CPU, compiled on a GPU.

Clusters of its own, exact limits, a bounded workspace, a key cluster that everybody retrieves, any strides, causality,
many documents, NaN and extreme inputs, equal results of equal runs, and its two custom operators.
"""

import copy
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_kernels import muse_attention, muse_clusters
from muse_kernels.attention import key_gradients, selection, streaming
from muse_kernels.attention.chunks import Group
from muse_kernels.attention.options import MuseOptions
from muse_kernels.attention.reference import MuseClusters
from tests.assertions import relative_error
from tests.kernels.attention.inputs import exact
from tests.kernels.attention.test_streaming import LIMITS, SMALL, assert_kernels_agree, make_qkv, name, results

KERNELS: dict[str, Any] = {**SMALL, "implementation": "triton"}
SPATIAL: dict[str, Any] = {"query_clustering": "spatial", "key_clustering": "spatial"}
"""Where clusters do not matter: bisection is most of what the interpreter takes its time for."""

CU_SEQLENS = [0, 0, 70, 71, 71, 140, 150, 150]
exhaustive = (pytest.mark.slow, pytest.mark.exhaustive)  # more of the same, for a GPU or a patient reader
LABELS = ("out", "lse", "dq", "dk", "dv")
QKV = tuple[Tensor, Tensor, Tensor]
Q, K, V = range(3)

REGROUPED = 1e-6
"""Relative error between float32 results whose sums are taken in another order."""


def cumulative(bounds: list[int], device: torch.device) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def differences(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    return {
        label: relative_error(found, wanted) for label, found, wanted in zip(LABELS, actual, expected, strict=False)
    }


def assert_within(limit: float, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    errors = differences(actual, expected)
    assert all(error <= limit for error in errors.values()), f"{errors}, accepted up to {limit}"


def run_forward(qkv: QKV, cu_seqlens: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor, MuseClusters]:
    """out, lse and the clusters that were made on the way."""
    encoded = MuseOptions(**options).resolved(qkv[0].shape[-1]).encoded()
    out, lse, *made = torch.ops.muse.attention_forward(*qkv, cu_seqlens, None, None, None, None, encoded)
    return out, lse, MuseClusters(*made)


def attend(qkv: QKV, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse."""
    out, lse = muse_attention(*qkv, return_lse=True, **options)
    return out, lse


def with_clusters_held(qkv: QKV, **options: Any) -> dict[str, Any]:
    """Options with the reference's clusters of these inputs."""
    options = {**SMALL, **options}
    clusters = muse_clusters(*qkv[:2], implementation="reference", **options)
    return {**options, "clusters": clusters, "implementation": "triton"}


def assert_identical(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for label, found, wanted in zip(LABELS, actual, expected, strict=False):
        assert torch.equal(found, wanted), label


# ------------------------------------------------------------------------------------------------ clusters of its own


class Row(NamedTuple):
    tokens: range
    document: range
    """Rows of the chunk table that its document has."""


def expected_rows(bounds: list[int], options: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for start, end in itertools.pairwise(bounds):
        if end - start > options["exact_below"]:
            chunks = [range(i, min(i + options["chunk"], end)) for i in range(start, end, options["chunk"])]
            document = range(len(rows), len(rows) + len(chunks))
            rows += [Row(chunk, document) for chunk in chunks]
    return rows


def assert_clusters_of_row(order: Tensor, tokens: range, cluster: int) -> None:
    """Every token of the chunk once; each cluster is full but for the last one that is not empty; ascending."""
    assert sorted(order[order >= 0].tolist()) == list(tokens)
    for index, members in enumerate(order.view(-1, cluster).tolist()):
        count = min(max(len(tokens) - index * cluster, 0), cluster)
        assert members == [*sorted(members[:count]), *[-1] * (cluster - count)]


@pytest.mark.parametrize(
    ("causal", "bounds", "exact_below", "num_rows"),
    [
        pytest.param(True, None, 0, 3),
        pytest.param(False, CU_SEQLENS, 69, 2 + 2),
        pytest.param(False, None, 0, 3, marks=exhaustive),
        pytest.param(True, CU_SEQLENS, 69, 2 + 2, marks=exhaustive),
        pytest.param(True, CU_SEQLENS, 0, 2 + 7, marks=exhaustive),
        pytest.param(False, CU_SEQLENS, 0, 2 + 7, marks=exhaustive),
    ],
)
def test_clusters_of_its_own(
    causal: bool, bounds: list[int] | None, exact_below: int, num_rows: int, device: torch.device
) -> None:
    qkv = make_qkv(150, device)
    options = {**KERNELS, "causal": causal, "exact_below": exact_below}
    cu_seqlens = None if bounds is None else cumulative(bounds, device)
    out, lse, clusters = run_forward(qkv, cu_seqlens, options)
    assert [tuple(x.shape) for x in clusters] == [
        (1, 2, num_rows, 64),
        (1, 1, num_rows, 64),
        (1, 2, num_rows, 4, 16),
        (1, 2, num_rows, 4, 2),
    ]
    rows = expected_rows(bounds or [0, 150], options)
    query_order, key_order, _, selected = (x.cpu() for x in clusters)
    for row, (tokens, document) in enumerate(rows):
        for order in (*query_order[0, :, row], *key_order[0, :, row]):
            assert_clusters_of_row(order, tokens, 16)
        others = [other for other in document if (other < row if causal else other != row)]
        far = [other * 4 + leaf for other in others for leaf in range(-(-len(rows[other].tokens) // 16))]
        for index, chosen in enumerate(selected[0, :, row].flatten(0, 1).tolist()):
            count = min(2, len(far)) if index % 4 * 16 < len(tokens) else 0
            assert set(chosen[:count]) <= set(far)
            assert chosen == [*sorted(set(chosen[:count])), *[-1] * (2 - count)]
    for x in (query_order, key_order, selected):
        assert (x[:, :, len(rows) :] == -1).all()
    assert (clusters.mu[:, :, len(rows) :] == 0).all()

    assert out.isfinite().all()
    assert lse.isfinite().all()
    # Given clusters come without the logits that selection saw: another way to the same sums.
    reused = results(qkv, torch.randn_like(out), clusters=clusters, cu_seqlens=cu_seqlens, **options)
    assert_within(REGROUPED, reused[:2], (out, lse))
    assert all(gradient.isfinite().all() for gradient in reused[2:])


# -------------------------------------------------------------------------------------------------------- exact limits


@pytest.mark.parametrize(
    ("causal", "bounds", "options"),
    [
        pytest.param(True, None, {"top_k": 12}),
        pytest.param(False, CU_SEQLENS, {"top_k": 12}),
        *(pytest.param(c, b, {"exact_below": 150}) for c in (True, False) for b in (None, CU_SEQLENS)),
        pytest.param(False, None, {"top_k": 12}, marks=exhaustive),
        pytest.param(True, CU_SEQLENS, {"top_k": 12, "order": 0}, marks=exhaustive),
        pytest.param(False, None, {"top_k": 12, "order": 0}, marks=exhaustive),
    ],
    ids=str,
)
def test_in_the_exact_limits_it_is_softmax_attention(
    causal: bool, bounds: list[int] | None, options: dict[str, Any], device: torch.device
) -> None:
    """No document has more than 12 key clusters."""
    qkv = make_qkv(150, device, heads=2 if bounds is None else 1)
    cu_seqlens = None if bounds is None else cumulative(bounds, device)
    options = {**KERNELS, **SPATIAL, **options, "causal": causal, "cu_seqlens": cu_seqlens}
    dout = torch.randn_like(qkv[0])
    out, _, *gradients = results(qkv, dout, **options)
    wide = [x.double().requires_grad_() for x in qkv]
    expected = exact(*wide, causal=causal, cu_seqlens=cu_seqlens)
    wanted = torch.autograd.grad(expected, wide, dout.double())
    assert_within(LIMITS[torch.float32], (out, out, *gradients), (expected, expected, *wanted))


# -------------------------------------------------------------------------------------------------- a bounded workspace


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        pytest.param({}, "rows", id="causal-rows"),
        pytest.param({}, "heads", id="causal-heads", marks=exhaustive),
        pytest.param(
            {"causal": False, "bounds": [0, 20, 150]}, "rows", id="bidirectional-documents-rows", marks=exhaustive
        ),
        pytest.param(
            {"causal": False, "bounds": [0, 20, 150]}, "heads", id="bidirectional-documents-heads", marks=exhaustive
        ),
    ],
)
def test_a_bounded_workspace_changes_nothing(
    options: dict[str, Any], cut: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two key-value heads of two query heads each, in two groups of heads, of one or several groups of rows."""
    qkv = make_qkv(150, device, heads=4, kv_heads=2)
    options = {**KERNELS, **SPATIAL, **options}
    if "bounds" in options:
        options["cu_seqlens"] = cumulative(options.pop("bounds"), device)
    dout = torch.randn_like(qkv[0])
    roomy = results(qkv, dout, **options)
    passes: list[list[Group]] = []

    class Tight(streaming.Workspace):
        """With the most memory, in KiB, that is cut as wanted."""

        def groups(self) -> Iterator[Group]:
            self.options = copy.copy(self.options)
            for kib in range(1000, 0, -2):
                object.__setattr__(self.options, "workspace_mib", Fraction(kib, 1024))
                groups = list(super().groups())
                heads, rows = (len({getattr(group, kind).start for group in groups}) for kind in ("heads", "rows"))
                if heads == 2 and (rows > 1) == (cut == "rows"):
                    passes.append(groups)
                    break
            return iter(passes[-1])

    monkeypatch.setattr(streaming, "Workspace", Tight)
    tight = results(qkv, dout, **options)
    assert len(passes) == 2
    for groups in passes:
        assert len(groups) == 2 if cut == "heads" else len(groups) >= 4
    assert_within(REGROUPED, tight, roomy)


# ----------------------------------------------------------------------------------- a cluster that everybody retrieves


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=exhaustive)], ids=["causal", "bidirectional"])
def test_a_cluster_that_everybody_retrieves(
    causal: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys 0 .. 15, a sink in the first cluster: its list is cut into pieces, which changes no gradient."""
    q, k, v = make_qkv(150, device, heads=4, kv_heads=2)
    q[..., 0] += 6
    k[:, :, :16, 0] += 4
    options: dict[str, Any] = {**SMALL, **SPATIAL, "causal": causal}
    selected = muse_clusters(q, k, implementation="reference", **options).selected[:, :, 1:]
    assert (selected[..., 0] == 0).sum() == 4 * (4 + 2)

    made: list[selection.InvertedLists] = []

    def recorded(*arguments: Any) -> selection.InvertedLists:
        made.append(selection.inverted_lists(*arguments))
        return made[-1]

    monkeypatch.setattr(key_gradients, "LONGEST_PIECE", 2)
    monkeypatch.setattr(streaming, "inverted_lists", recorded)
    assert_kernels_agree((q, k, v), **options)
    (lists,) = made
    lengths = lists.start.diff().view(2, -1)
    assert (lengths[:, 0] == 12).all()  # query clusters: of two heads, four and two
    assert (lengths[:, 1:] % 2 == 1).any()


# ------------------------------------------------------------------------------------------------------------- rounding


ROUNDED_GRADIENT = 4e-3
"""Relative error of dkbar in float16: some roundings, of 5e-4 each, and nothing that grows with the queries' mean."""


@pytest.mark.gpu
def test_the_mean_of_the_queries_cancels_in_the_gradient_of_summaries(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dkbar = scale sum dlogit (q - mu): queries share a large element that keys lack, so that it changes no logit.

    The interpreter multiplies in float32: there is something to see on a GPU alone.
    """
    q, k, v = make_qkv(100, device, heads=1, dtype=torch.float16)
    q[..., 0] = 100 + torch.randn_like(q[..., 0])
    k[..., 0] = 0
    options = with_clusters_held((q, k, v), **SPATIAL, top_k=0)
    dout, found = torch.randn_like(q), []

    def recorded(*arguments: Any, **flags: Any) -> None:
        found.append(arguments[4].kbar.clone())
        key_gradients.key_gradients(*arguments, **flags)

    monkeypatch.setattr(streaming, "key_gradients", recorded)
    results((q, k, v), dout, **options)
    results((q.float(), k.float(), v.float()), dout.float(), **options)
    assert relative_error(*found) <= ROUNDED_GRADIENT


# -------------------------------------------------------------------------------------------------------------- layouts


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_apart(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def packed(x: Tensor) -> Tensor:
    """One of three, as a projection to q, k and v together leaves them."""
    return torch.stack([x.transpose(1, 2)] * 3, dim=2)[:, :, 1].transpose(1, 2)


LAYOUTS = [tokens_first, channels_apart, packed]


@pytest.mark.parametrize(
    "first",
    [0, pytest.param(1, marks=exhaustive), pytest.param(2, marks=exhaustive)],
    ids=lambda i: LAYOUTS[i].__name__,
)
def test_strides_do_not_matter(first: int, device: torch.device) -> None:
    """q, k and v each have another layout, dout another than q; in the first case it is the same for all tokens."""
    qkv = make_qkv(70, device, heads=2, kv_heads=2)
    q, k, v = (LAYOUTS[(first + i) % 3](x) for i, x in enumerate(qkv))
    dout = LAYOUTS[(first + 1) % 3](torch.randn(q.shape, device=device))
    if first == 0:
        dout = torch.randn(16, device=device).expand(q.shape)
    assert not any(x.is_contiguous() for x in (q, k, v, dout))
    assert_within(REGROUPED, results((q, k, v), dout, **KERNELS), results(qkv, dout.contiguous(), **KERNELS))


# ---------------------------------------------------------------------------------------------- autocast, torch.compile


def test_autocast_computes_in_its_dtype_as_sdpa_does(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(80, device))
    options = {**KERNELS, **SPATIAL, "top_k": 4}  # exact
    with torch.autocast(device.type, torch.float16):
        out, lse = muse_attention(q, k, v, return_lse=True, **options)
        twin = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert out.dtype == twin.dtype == torch.float16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, muse_attention(q.half(), k.half(), v.half(), **options), rtol=0, atol=0)
    assert relative_error(out, twin) <= LIMITS[torch.float16]
    dout = torch.randn_like(out)
    gradients, wanted = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, twin))
    for found, want in zip(gradients, wanted, strict=True):
        assert found.dtype == want.dtype == torch.float32
        assert relative_error(found, want) <= 2 * LIMITS[torch.float16]  # both are rounded


def test_torch_compile_sees_one_graph(device: torch.device) -> None:
    qkv, options = make_qkv(70, device, heads=1), {**KERNELS, **SPATIAL}
    compiled = torch.compile(lambda *qkv: attend(qkv, **options)[0] * 2, backend="aot_eager", fullgraph=True)
    q, k, v = leaves = [x.requires_grad_() for x in qkv]
    out, expected = compiled(q, k, v), attend((q, k, v), **options)[0] * 2
    dout = torch.randn_like(out)
    gradients = [torch.autograd.grad(x, leaves, dout) for x in (out, expected)]
    assert_within(REGROUPED, (out, out, *gradients[0]), (expected, expected, *gradients[1]))


@pytest.mark.parametrize(
    "bounds", [pytest.param(None, marks=exhaustive), [0, 0, 70, 70]], ids=["one document", "documents"]
)
def test_the_operators_are_registered_soundly(bounds: list[int] | None, device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(70, device, heads=1))
    cu_seqlens = None if bounds is None else cumulative(bounds, device)
    options = MuseOptions(**KERNELS, **SPATIAL).resolved(head_dim=16).encoded()
    inputs = (q, k, v, cu_seqlens)
    torch.library.opcheck(torch.ops.muse.attention_forward, (*inputs, None, None, None, None, options))
    with torch.no_grad():
        out, lse, *clusters = torch.ops.muse.attention_forward(*inputs, None, None, None, None, options)
        torch.library.opcheck(torch.ops.muse.attention_forward, (*inputs, *clusters, options))
    detached = [x.detach() for x in (out, q, k, v, out)]
    torch.library.opcheck(torch.ops.muse.attention_backward, (*detached, lse, cu_seqlens, *clusters, options))


# ------------------------------------------------------------------------------------------------------------ causality


def changed(qkv: QKV, first: int) -> QKV:
    """Copies in which tokens from `first` on are others, and large."""
    return tuple(torch.cat([x[:, :, :first], 3 * torch.randn_like(x[:, :, first:])], dim=2) for x in qkv)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"selection": "centroid"}, marks=exhaustive),
        pytest.param({"expansion": "zero", "order": 0}, marks=exhaustive),
    ],
    ids=name,
)
def test_a_later_chunk_never_reaches_an_output(options: dict[str, Any], device: torch.device) -> None:
    qkv, options = make_qkv(140, device, heads=1), {**KERNELS, **options}
    before = attend(qkv, **options)
    for start in (64, 128):
        after = attend(changed(qkv, start), **options)
        for found, wanted in zip(after, before, strict=True):
            assert torch.equal(found[:, :, :start], wanted[:, :, :start]), start


@pytest.mark.parametrize("order", [pytest.param(0, marks=exhaustive), 1])
def test_with_clusters_held_nothing_later_reaches_an_output(order: int, device: torch.device) -> None:
    qkv = make_qkv(150, device, heads=1)
    options = with_clusters_held(qkv, order=order)
    before = attend(qkv, **options)
    for start in (1, 40, 65, 100, 127, 149):
        after = attend(changed(qkv, start), **options)
        for found, wanted in zip(after, before, strict=True):
            assert torch.equal(found[:, :, :start], wanted[:, :, :start]), start
            assert not torch.equal(found, wanted)


def test_the_gradient_of_an_output_stays_before_it(device: torch.device) -> None:
    qkv = make_qkv(150, device, heads=1)
    dout = torch.zeros_like(qkv[0])
    dout[:, :, 70] = 1
    _, _, dq, dk, dv = results(qkv, dout, **KERNELS, **SPATIAL)
    assert ((dq != 0).any(-1) == (dout != 0).all(-1)).all()
    for gradient in (dk, dv):
        assert (gradient[:, :, :71] != 0).any(-1).all()
        assert (gradient[:, :, 71:] == 0).all()


# ------------------------------------------------------------------------------------------------------------ documents


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=exhaustive)], ids=["causal", "bidirectional"])
def test_hundreds_of_short_documents_beside_a_long_one(causal: bool, device: torch.device) -> None:
    lengths = torch.randint(0, 4, (600,)).tolist()
    lengths[300] = 200
    ends = list(itertools.accumulate(lengths))
    cu_seqlens = cumulative([0, *ends, *[ends[-1]] * 50], device)
    qkv = make_qkv(ends[-1], device, heads=1)
    assert_kernels_agree(qkv, cu_seqlens, causal=causal, exact_below=64)


def test_as_many_rows_as_there_can_be(device: torch.device) -> None:
    """Every document has a row of the chunk table, and one token or two."""
    cu_seqlens = cumulative([*range(20), 40, 105, 105], device)
    assert_kernels_agree(make_qkv(105, device, heads=1), cu_seqlens)


# -------------------------------------------------------------------------------------------------- NaN, extreme inputs


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=exhaustive)], ids=str)
@pytest.mark.parametrize("which", [K, V], ids=["key", "value"])
def test_what_is_not_finite_reaches_later_outputs_alone(which: int, value: float, device: torch.device) -> None:
    """With clusters held. Its cluster is summarised or retrieved: either way it is seen by all later queries.

    In its own chunk a value also meets the weight 0 of earlier queries, as in every exact attention.
    """
    clean = make_qkv(200, device, heads=1)
    options = with_clusters_held(clean)
    spoilt = tuple(x.clone() for x in clean)
    spoilt[which][:, :, 100, 3] = value
    before, after = (attend(qkv, **options) for qkv in (clean, spoilt))
    untouched = 100 if which == K else 64
    for found, wanted in zip(after, before, strict=True):
        assert torch.equal(found[:, :, :untouched], wanted[:, :, :untouched])
    is_reached = ~after[0][:, :, 100:].isfinite().all(-1)
    # A query whose element is negative gives an infinite key no weight.
    assert is_reached.any() if which == K and value == float("inf") else is_reached.all()


def test_a_query_that_is_not_a_number_spoils_its_own_output_alone(device: torch.device) -> None:
    clean = make_qkv(150, device, heads=1)
    options = with_clusters_held(clean)
    spoilt = (clean[Q].clone(), *clean[1:])
    spoilt[Q][:, :, 100, 0] = float("nan")
    (before, _), (after, _) = (attend(qkv, **options) for qkv in (clean, spoilt))
    assert after[:, :, 100].isnan().all()
    others = torch.arange(150, device=device) != 100
    assert torch.equal(after[:, :, others], before[:, :, others])


TWO_DOCUMENTS = [0, 130, 200]


@pytest.fixture(scope="module")
def in_two_documents(device: torch.device) -> tuple[QKV, Tensor, tuple[Tensor, ...]]:
    """Inputs, the gradient of their output, and what comes of them, all finite."""
    torch.manual_seed(0)
    qkv = make_qkv(200, device, heads=1)
    dout = torch.randn_like(qkv[0])
    return qkv, dout, results(qkv, dout, cu_seqlens=cumulative(TWO_DOCUMENTS, device), **KERNELS)


@pytest.mark.parametrize(
    ("which", "value"),
    [
        pytest.param(Q, float("nan")),
        pytest.param(K, float("nan")),
        pytest.param(V, float("nan"), marks=exhaustive),
        pytest.param(K, float("inf"), marks=exhaustive),
        *(pytest.param(which, float("inf"), marks=exhaustive) for which in (Q, V)),
        *(pytest.param(which, -float("inf"), marks=exhaustive) for which in (Q, K, V)),
    ],
)
def test_what_is_not_finite_leaves_earlier_chunks_and_other_documents_alone(
    which: int, value: float, in_two_documents: tuple[QKV, Tensor, tuple[Tensor, ...]], device: torch.device
) -> None:
    """With clusters of its own, made of what is not finite: they still hold every token once, and nothing hangs."""
    clean, dout, before = in_two_documents
    cu_seqlens = cumulative(TWO_DOCUMENTS, device)
    spoilt = tuple(x.clone() for x in clean)
    spoilt[which][:, :, 70] = value
    after = results(spoilt, dout, cu_seqlens=cu_seqlens, **KERNELS)
    for found, wanted in zip(after, before, strict=True):
        assert torch.equal(found[:, :, 130:], wanted[:, :, 130:])
    assert torch.equal(after[0][:, :, :64], before[0][:, :, :64])
    assert not after[0][:, :, 70].isfinite().any()
    _, _, clusters = run_forward(spoilt, cu_seqlens, KERNELS)
    for order in clusters[:2]:
        assert sorted(order[order >= 0].tolist()) == list(range(200))


def with_norm(x: Tensor, norm: float) -> Tensor:
    return norm * F.normalize(x.float(), dim=-1).to(x.dtype)


def extreme(kind: str, q: Tensor, k: Tensor, v: Tensor) -> QKV:
    match kind:
        case "equal keys":
            return q, k[:, :, :1].expand_as(k).contiguous(), v
        case "zero queries":
            return torch.zeros_like(q), k, v
        case "all zero":
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        case "norms of 1e4":
            return with_norm(q, 1e4), with_norm(k, 1e4), with_norm(v, 1e4)
    return tuple(100 * (2 * torch.rand_like(x) - 1) for x in (q, k, v))


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("lead", [70.0, 95.0], ids=["beyond 2^64", "beyond a float"])
def test_far_keys_may_outweigh_the_near_field_by_any_factor(top_k: int, lead: float, device: torch.device) -> None:
    """A few queries look for one early key alone: weights relative to the near field's lse are out of range."""
    q, k, v = make_qkv(200, device, head_dim=16)
    q[:, :, 130:150, 0] = lead
    k[:, :, :, 0] = 0
    k[:, :, 5, 0] = 1
    # A logit of `lead` is rounded by as much of itself, and its weight by that in all.
    assert_kernels_agree((q, k, v), top_k=top_k, softmax_scale=1.0, limit=lead * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("equal keys", torch.float32),
        ("zero queries", torch.float32),
        ("all zero", torch.float32),
        ("norms of 1e4", torch.float32),
        ("norms of 1e4", torch.bfloat16),
        ("values up to 100", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=exhaustive)], ids=["causal", "bidirectional"])
def test_extreme_inputs_stay_finite(kind: str, dtype: torch.dtype, causal: bool, device: torch.device) -> None:
    qkv = extreme(kind, *make_qkv(100, device, heads=1, dtype=dtype))
    found = results(qkv, torch.randn_like(qkv[0]), **KERNELS, causal=causal)
    leaves = [x.requires_grad_() for x in qkv]
    assert exact(*leaves, causal=causal).isfinite().all()
    for label, x in zip(LABELS, found, strict=True):
        assert x.isfinite().all(), label
    if kind in ("equal keys", "zero queries"):  # then a summary tells all there is to tell
        assert relative_error(found[0], exact(*leaves, causal=causal)) <= LIMITS[dtype]


def test_a_scale_of_zero_weighs_all_keys_alike(device: torch.device) -> None:
    qkv = make_qkv(140, device, heads=1)
    found = results(qkv, torch.randn_like(qkv[0]), **KERNELS, softmax_scale=0.0)
    for label, x in zip(LABELS, found, strict=True):
        assert x.isfinite().all(), label
    mean = qkv[V].cumsum(2) / torch.arange(1, 141, device=device)[:, None]
    assert relative_error(found[0], mean) <= LIMITS[torch.float32]


def test_a_summary_of_32_key_clusters(device: torch.device) -> None:
    """One bit each in an int32, the last of which is its sign; and lists longer than one tile."""
    qkv = make_qkv(1100, device, heads=1, head_dim=16)
    options = {**SPATIAL, "chunk": 512, "query_cluster": 128, "key_cluster": 16, "summary_cluster": 512, "top_k": 40}
    options |= {"selection": "centroid", "exact_below": 0}
    assert_kernels_agree(qkv, **options)


# ---------------------------------------------------------------------------------------------------------- equal runs


@pytest.fixture(params=[pytest.param(False, marks=exhaustive), True], ids=["as usual", "deterministic algorithms"])
def is_deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def test_equal_runs_give_equal_bits(is_deterministic: bool, device: torch.device) -> None:
    """Gradients on a GPU: PyTorch's own attention adds dq up in any order, unless told not to."""
    qkv = make_qkv(100, device)
    dout = torch.randn_like(qkv[0])
    first, second = (results(qkv, dout, **KERNELS) for _ in range(2))
    count = 2 if device.type == "cuda" and not is_deterministic else 5
    assert_identical(first[:count], second[:count])
