"""The near field against a softmax written out in float64, with gradients of a softmax that sees more than the segment.

On a CPU, library kernels that exist on GPUs alone are replaced by plain PyTorch: what is around them is tested. Tests
marked `gpu` run the kernels themselves.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from muse_kernels.attention import near_field as module
from muse_kernels.attention import near_library
from muse_kernels.attention.chunks import ChunkTable, chunk_table
from muse_kernels.attention.near_field import Backend, choose_backend, near_field, near_field_backward
from muse_kernels.attention.options import MuseOptions, ResolvedOptions
from tests.assertions import assert_as_accurate

CHUNK = 64
FAR_KEYS = 40
HALF_MULTIPLE, FLOAT32_MULTIPLE = 4.0, 16.0
"""The backward pass is given the merged out and lse rounded, the baseline keeps its own; and a GPU multiplies float32
as three products of TF32, which carry a few bits less than a CPU's arithmetic does."""

LSE_TOLERANCE = 2e-4
"""float32 whatever the inputs are; GPUs approximate exp and log."""


class Case(NamedTuple):
    num_tokens: int
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    lengths: tuple[int, ...] | None = None
    exact_below: int = 100
    causal: bool = True
    layout: str = "contiguous"

    def options(self) -> ResolvedOptions:
        options = MuseOptions(
            chunk=CHUNK,
            query_cluster=16,
            key_cluster=16,
            exact_below=self.exact_below,
            causal=self.causal,
            softmax_scale=0.3 * self.head_dim**-0.25,
        )
        return options.resolved(self.head_dim)

    def segment_of_token(self) -> Tensor:
        """The number of each token's segment."""
        sizes: list[int] = []
        for length in self.lengths or (self.num_tokens,):
            whole = [CHUNK] * (length // CHUNK) + [length % CHUNK]
            sizes += [length] if length <= self.exact_below else whole
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


DOCUMENTS = (30, 0, 150, 64, 1, 200, 101, 100)
SHAPES = {
    "one token": Case(1),
    "exact row": Case(90),
    "longest exact row": Case(100),
    "shortest row of chunks": Case(101),
    "exact rows": Case(90, batch=2),
    "two chunks": Case(128),
    "chunks": Case(256, heads=3, kv_heads=3),
    "a token more": Case(257),
    "partial chunk": Case(256 + 37, kv_heads=1),
    "rows of chunks": Case(256, batch=2),
    "rows with partial chunks": Case(200, batch=3),
    "shorter than a chunk, not exact": Case(50, batch=2, exact_below=10),
    "head_dim 16": Case(130, head_dim=16),
    "head_dim 20": Case(130, head_dim=20),
    "head_dim 64": Case(200, head_dim=64),
    "head_dim 96": Case(200, head_dim=96),
    "head_dim 128": Case(200, head_dim=128),
    "head_dim 256": Case(200, head_dim=256),
    "documents": Case(sum(DOCUMENTS), lengths=DOCUMENTS),
    "padded documents": Case(sum(DOCUMENTS), lengths=(*DOCUMENTS, 0, 0, 0)),
    "documents, none exact": Case(sum(DOCUMENTS), lengths=DOCUMENTS, exact_below=0),
    "documents, all exact": Case(sum(DOCUMENTS), lengths=DOCUMENTS, exact_below=1000),
    "documents of one token": Case(5, lengths=(1,) * 5),
    "documents, head_dim 20": Case(sum(DOCUMENTS), lengths=DOCUMENTS, head_dim=20),
    "documents, head_dim 128": Case(sum(DOCUMENTS), lengths=DOCUMENTS, head_dim=128),
    "documents, head_dim 256": Case(sum(DOCUMENTS), lengths=DOCUMENTS, head_dim=256, kv_heads=1),
}
LAYOUTS = ["contiguous", "tokens first", "one projection", "every second element", "expanded", "unaligned"]
CASES = {
    **SHAPES,
    **{f"{name}, both directions": case._replace(causal=False) for name, case in SHAPES.items() if case.head_dim == 32},
    **{f"rows of chunks, {x}": SHAPES["rows of chunks"]._replace(layout=x) for x in LAYOUTS[1:]},
    **{f"partial chunk, {x}": SHAPES["partial chunk"]._replace(layout=x) for x in LAYOUTS[1:]},
    **{f"exact rows, {x}": SHAPES["exact rows"]._replace(layout=x) for x in LAYOUTS[1:]},
    **{f"documents, {x}": SHAPES["documents"]._replace(layout=x) for x in LAYOUTS[1:]},
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Equal values in another layout (for "expanded": those of the first head)."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one projection":
        both = torch.cat([x, x.new_zeros(x.shape)], dim=1).transpose(1, 2).contiguous()
        return both[:, :, : x.shape[1]].transpose(1, 2)
    if layout == "every second element":
        return torch.stack([x, x.new_zeros(x.shape)], dim=-1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return x[:, :1].expand(-1, x.shape[1], -1, -1)
    if layout == "unaligned":
        return torch.cat([x.new_zeros(*x.shape[:-1], 1), x], dim=-1)[..., 1:]
    return x


class Inputs(NamedTuple):
    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    far_k: Tensor
    far_v: Tensor
    cu_seqlens: Tensor | None
    table: ChunkTable


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    def tensor(heads: int, num_tokens: int) -> Tensor:
        return torch.randn(case.batch, heads, num_tokens, case.head_dim).to(device, dtype)

    near = (tensor(heads, case.num_tokens) for heads in (case.heads, case.heads, case.kv_heads, case.kv_heads))
    dout, q, k, v = (laid_out(x, case.layout) for x in near)
    far_k, far_v = tensor(case.kv_heads, FAR_KEYS), tensor(case.kv_heads, FAR_KEYS)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=device)
    table = chunk_table(case.num_tokens, cu_seqlens, case.options(), device)
    return Inputs(dout, q, k, v, far_k, far_v, cu_seqlens, table)


class Expected(NamedTuple):
    out: Tensor
    lse: Tensor
    merged_out: Tensor
    """Over the segment and the far keys."""
    merged_lse: Tensor
    dq: Tensor
    """Through the segment's keys alone, of the merged output."""
    dk: Tensor
    dv: Tensor


def expect(case: Case, inputs: Inputs, dtype: torch.dtype) -> Expected:
    """Everything in plain PyTorch, in `dtype`, on a CPU."""
    dout, q, k, v, far_k, far_v = (x.detach().cpu().to(dtype) for x in inputs[:6])
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    group = case.heads // case.kv_heads
    scale = case.options().softmax_scale
    near_k, near_v, far_k, far_v = (x.repeat_interleave(group, dim=1) for x in (k, v, far_k, far_v))
    segment, token = case.segment_of_token(), torch.arange(case.num_tokens)
    is_seen = segment[:, None] == segment
    if case.causal:
        is_seen = is_seen & (token[:, None] >= token)
    near = (q * scale @ near_k.mT).masked_fill(~is_seen, -math.inf)
    out, lse = near.softmax(-1) @ near_v, near.logsumexp(-1)
    # The far part of dq is not the near field's.
    logits = torch.cat([near, q.detach() * scale @ far_k.mT], dim=-1)
    merged_out = logits.softmax(-1) @ torch.cat([near_v, far_v], dim=2)
    dq, dk, dv = torch.autograd.grad(merged_out, (q, k, v), dout)
    return Expected(*(x.detach() for x in (out, lse, merged_out, logits.logsumexp(-1), dq, dk, dv)))


def check(case: Case, dtype: torch.dtype, device: torch.device, backend: Backend | None) -> None:
    """Forward and backward against the definition."""
    inputs = make_inputs(case, dtype, device)
    dout, q, k, v, _, _, cu_seqlens, table = inputs
    options = case.options()
    exact, baseline = expect(case, inputs, torch.float64), expect(case, inputs, dtype)
    out, lse = near_field(q, k, v, cu_seqlens, table, options, backend)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    merged = exact.merged_out.to(device, dtype), exact.merged_lse.to(device, torch.float32)
    gradients = near_field_backward(dout, q, k, v, *merged, cu_seqlens, table, options, backend)
    assert all(x.is_contiguous() for x in gradients)

    multiple = FLOAT32_MULTIPLE if dtype == torch.float32 else HALF_MULTIPLE
    assert_as_accurate(out, exact=exact.out, baseline=baseline.out, multiple=multiple, name="out")
    torch.testing.assert_close(lse.double().cpu(), exact.lse, rtol=0, atol=LSE_TOLERANCE)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        expected = {"exact": getattr(exact, name), "baseline": getattr(baseline, name)}
        assert_as_accurate(gradient, **expected, multiple=multiple, name=name)


# --------------------------------------------------------------------------------------------------- on any machine


def _each_segment(q: Tensor, segments: Any, attend: Callable[[slice], None]) -> None:
    bounds = [0, q.shape[2]] if segments is None else segments.bounds.tolist()
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, q.shape[2])
    for start, end in itertools.pairwise(bounds):
        assert segments is None or end - start <= segments.longest
        if end > start:
            attend(slice(start, end))


def _emulated(q: Tensor, k: Tensor, v: Tensor, segments: Any, options: ResolvedOptions) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])

    def attend(own: slice) -> None:
        out[:, :, own], lse[:, :, own] = module.exact_attention(
            q[:, :, own] * options.softmax_scale, k[:, :, own], v[:, :, own], options.causal, 1
        )

    _each_segment(q, segments, attend)
    return out, lse


def _emulated_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Any, options: ResolvedOptions
) -> tuple[Tensor, ...]:
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

    def attend(own: slice) -> None:
        merged = module.Merged(out[:, :, own], lse[:, :, own], dout[:, :, own])
        own_dq, dk[:, :, own], dv[:, :, own] = module.exact_attention_backward(
            q[:, :, own] * options.softmax_scale, k[:, :, own], v[:, :, own], merged, options.causal, 1
        )
        dq[:, :, own] = own_dq * options.softmax_scale

    _each_segment(q, segments, attend)
    return dq, dk, dv


@pytest.fixture
def kernels_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the library's kernels by plain PyTorch, and lists which would have run."""
    called: list[str] = []

    def replace(name: str, function: Callable[..., Any], *, takes_segments: bool) -> None:
        def kernel(*arguments: Any) -> Any:
            called.append(name.strip("_"))
            tensors, options = arguments[: len(arguments) - 1 - takes_segments], arguments[-1]
            for x in tensors:
                if x.dim() == 4:
                    assert x.stride(-1) == 1
                    assert all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
                    assert all(s > 0 for s, size in zip(x.stride(), x.shape, strict=True) if size > 1)
                    assert x.shape[-1] % 8 == 0
            return function(*tensors, arguments[-2] if takes_segments else None, options)

        monkeypatch.setattr(near_library, name, kernel)

    for name in ("cudnn", "flash", "efficient"):
        replace(f"_{name}", _emulated, takes_segments=name != "cudnn")
        replace(f"_{name}_backward", _emulated_backward, takes_segments=name != "cudnn")
    return called


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_plain(case: Case) -> None:
    check(case, torch.float32, torch.device("cpu"), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["rows with partial chunks", "documents"])
def test_plain_in_low_precision(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype, torch.device("cpu"), None)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_around_the_kernels(case: Case, backend: Backend, kernels_called: list[str]) -> None:
    check(case, torch.float32, torch.device("cpu"), backend)
    assert kernels_called
    # cuDNN has no segments of variable length, and leaves short ones to FlashAttention.
    others = {"flash", "flash_backward"} if backend == "cudnn" else set()
    assert set(kernels_called) <= {backend, f"{backend}_backward"} | others


def test_cudnn_takes_all_chunks_of_a_row_at_once(kernels_called: list[str]) -> None:
    check(SHAPES["partial chunk"], torch.float32, torch.device("cpu"), "cudnn")
    assert kernels_called == ["cudnn", "flash", "cudnn_backward", "flash_backward"]


@pytest.mark.parametrize("name", ["chunks", "rows with partial chunks", "exact rows", "documents"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cudnn_finds_its_plan_by_all_that_is_in_it(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides on a plan, the layouts of q, k and v, has to decide on those of out and dout."""
    plans: dict[Any, Any] = {}

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Any) -> Any:
        layouts = [(tuple(x.shape), x.stride()) for x in (q, k, v, out, dout)]
        assert plans.setdefault(str(layouts[:3]), layouts[3:]) == layouts[3:]
        return _emulated_backward(dout, q, k, v, out, lse, None, options)

    monkeypatch.setattr(near_library, "_cudnn_backward", backward)
    monkeypatch.setattr(near_library, "_flash_backward", _emulated_backward)
    for num_tokens, layout_of_dout in itertools.product((128, 192, 200), LAYOUTS):
        case = SHAPES[name]._replace(num_tokens=num_tokens, lengths=None, layout=layout)
        dout, q, k, v, _, _, cu_seqlens, table = make_inputs(case, torch.float32, torch.device("cpu"))
        dout, lse = laid_out(dout.contiguous(), layout_of_dout), q.new_zeros(q.shape[:-1])
        near_field_backward(dout, q, k, v, dout, lse, cu_seqlens, table, case.options(), "cudnn")
    assert plans


@pytest.mark.parametrize("backend", [None, "cudnn", "flash", "efficient"])
@pytest.mark.parametrize("shape", [(1, 2, 0, 16), (0, 2, 100, 16)])
@pytest.mark.parametrize("has_documents", [False, True])
def test_nothing_to_attend(shape: tuple[int, ...], has_documents: bool, backend: Backend | None) -> None:
    q = torch.zeros(shape)
    cu_seqlens = torch.zeros(3, dtype=torch.int32) if has_documents else None
    options = Case(1, head_dim=16).options()
    table = chunk_table(shape[2], cu_seqlens, options, q.device)
    out, lse = near_field(q, q, q, cu_seqlens, table, options, backend)
    assert (out.shape, lse.shape) == (shape, shape[:-1])
    gradients = near_field_backward(q, q, q, q, out, lse, cu_seqlens, table, options, backend)
    assert [x.shape for x in gradients] == [shape] * 3


@pytest.mark.parametrize("values", [[5, 3], [-7, 4, 2], [100, 900], [0, 10, 10, 60], [-(2**31), 2**31 - 1, 0, 50]])
def test_garbage_in_cu_seqlens_leaves_no_token_out(values: list[int], kernels_called: list[str]) -> None:
    """`_each_segment` asserts that segments cover the tokens in order and that none is longer than promised."""
    q, k, v = make_inputs(Case(300), torch.float32, torch.device("cpu"))[1:4]
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    table = chunk_table(300, cu_seqlens, Case(300).options(), q.device)
    out, lse = near_field(q, k, v, cu_seqlens, table, Case(300).options(), "flash")
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("name", ["partial chunk", "exact rows", "documents", "one token", "documents of one token"])
def test_operators_of_this_pytorch_take_these_arguments(name: str, backend: Backend) -> None:
    """Shapes alone: nothing is computed on the device "meta"."""
    case, device = CASES[name], torch.device("meta")
    dout, q, k, v, _, _, cu_seqlens, table = make_inputs(case, torch.bfloat16, device)
    out, lse = near_field(q, k, v, cu_seqlens, table, case.options(), backend)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:-1])
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    if backend != "efficient":  # PyTorch's own declaration of that backward lacks an argument
        gradients = near_field_backward(dout, q, k, v, out, lse, cu_seqlens, table, case.options(), backend)
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


# --------------------------------------------------------------------------------------------------------- on a GPU

HALF_BACKENDS: list[Backend] = ["cudnn", "flash", "efficient"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [None, *HALF_BACKENDS])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernels(case: Case, backend: Backend | None, dtype: torch.dtype, device: torch.device) -> None:
    if backend == "cudnn" and case.head_dim > module.CUDNN_HEAD_DIM:
        pytest.skip("cuDNN's backward does not take this head_dim")
    check(case, dtype, device, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernels_in_float32(case: Case, device: torch.device) -> None:
    check(case, torch.float32, device, None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["partial chunk", "rows of chunks", "documents", "head_dim 256"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_are_deterministic_when_asked(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    dout, q, k, v, _, _, cu_seqlens, table = make_inputs(case, dtype, device)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend(q, cu_seqlens, case.options()) != "cudnn"
        out, lse = near_field(q, k, v, cu_seqlens, table, case.options())
        runs = [near_field_backward(dout, q, k, v, out, lse, cu_seqlens, table, case.options()) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for gradients in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(gradients, runs[0], strict=True))


@pytest.mark.gpu
def test_choice_of_kernels(device: torch.device) -> None:
    q = torch.zeros(1, 1, 200, 64, dtype=torch.bfloat16, device=device)
    cu_seqlens = torch.tensor([0, 200], dtype=torch.int32, device=device)
    options = Case(200, head_dim=64).options()
    assert choose_backend(q, None, options) == "cudnn"
    assert choose_backend(q, cu_seqlens, options) == "flash"
    assert choose_backend(q[:, :, :20], None, options) == "flash"
    assert choose_backend(q.expand(-1, -1, -1, 64).repeat(1, 1, 1, 4), None, options) == "flash"
    assert choose_backend(q.float(), None, options) == "efficient"


@pytest.mark.gpu
def test_plans_of_scaled_dot_product_attention_are_not_taken(device: torch.device) -> None:
    """The same q, k and v, attended before with another layout of dout."""
    case = SHAPES["exact rows"]._replace(head_dim=64)
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in make_inputs(case, torch.bfloat16, device)[1:4])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        scale = case.options().softmax_scale
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        out.backward(laid_out(torch.randn_like(out), "tokens first"))
    check(case, torch.bfloat16, device, "cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["partial chunk", "rows of chunks", "documents", "head_dim 256"])
def test_runs_in_a_cuda_graph(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Which also shows that nothing is read on the host."""
    case = CASES[name]
    dout, q, k, v, _, _, cu_seqlens, _ = make_inputs(case, dtype, device)

    def run() -> tuple[Tensor, ...]:
        table = chunk_table(case.num_tokens, cu_seqlens, case.options(), device)
        out, lse = near_field(q, k, v, cu_seqlens, table, case.options())
        gradients = near_field_backward(dout, q, k, v, out, lse, cu_seqlens, table, case.options())
        return out, lse, *gradients

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [x.clone() for x in run()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    for result, x in zip(results, expected, strict=True):
        torch.testing.assert_close(result, x, rtol=1e-2, atol=1e-2)
