"""One contract for every strategy that muse_lightning.attention exports."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import muse_lightning.attention
from muse_kernels.attention.options import MuseOptions
from muse_kernels.cost import muse_pairs
from muse_lightning.attention import AttentionStrategy, Dense, Muse, SlidingWindow, SpatialBlocks

SMALL: dict[str, dict[str, Any]] = {
    "Dense": {},
    "Muse": {"chunk": 16, "query_cluster": 4, "key_cluster": 4, "top_k": 1, "exact_below": 0},
    "SlidingWindow": {"window": 16},
    "SpatialBlocks": {"chunk": 16, "query_cluster": 4, "key_cluster": 4, "top_k": 1, "exact_below": 0},
}
"""Sizes at which every strategy but Dense is inexact for 60 tokens."""

EXPORTED = {
    name: value
    for name, value in vars(muse_lightning.attention).items()
    if isinstance(value, type) and issubclass(value, AttentionStrategy) and value is not AttentionStrategy
}

NUM_TOKENS = 60
CU_SEQLENS = torch.tensor([0, 25, 60, 61, 61, 120, 120, 120], dtype=torch.int32)
"""Two rows of 60 tokens: documents of 25, 35, 1, 0 and 59 tokens, padded."""


def test_every_exported_strategy_is_covered() -> None:
    assert EXPORTED.keys() == SMALL.keys()
    assert len(EXPORTED) == 4


@pytest.fixture(params=sorted(SMALL))
def strategy(request: pytest.FixtureRequest) -> AttentionStrategy:
    return EXPORTED[request.param](0, **SMALL[request.param])


def random_qkv(batch: int = 2, num_tokens: int = NUM_TOKENS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, n, num_tokens, 8, dtype=dtype).requires_grad_() for n in (4, 2, 2))


def exact_by_loop(q: Tensor, k: Tensor, v: Tensor, sees: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Softmax attention with an explicit mask: `sees(query positions, key positions)`."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    positions = torch.arange(q.shape[2])
    logits = (0.3 * q @ k.mT).masked_fill(~sees(positions[:, None], positions), -torch.inf)
    return logits.softmax(-1) @ v


def test_it_has_no_state_and_keeps_shape_and_dtype(strategy: AttentionStrategy) -> None:
    assert not strategy.state_dict()
    assert not list(strategy.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        out = strategy(*random_qkv(dtype=dtype), softmax_scale=0.3)
        assert out.shape == (2, 4, NUM_TOKENS, 8)
        assert out.dtype == dtype


def test_documents_are_attended_apart(strategy: AttentionStrategy) -> None:
    qkv = random_qkv()
    packed = strategy(*qkv, softmax_scale=0.3, cu_seqlens=CU_SEQLENS)
    flat = [x.transpose(0, 1).flatten(1, 2)[None] for x in qkv]
    parts = [
        strategy(*(x[:, :, start:end] for x in flat), softmax_scale=0.3)
        for start, end in itertools.pairwise(CU_SEQLENS.tolist())
        if end > start
    ]
    apart = torch.cat(parts, dim=2)[0].unflatten(1, (2, NUM_TOKENS)).transpose(0, 1)
    torch.testing.assert_close(packed, apart)
    dout = torch.randn_like(packed)
    torch.testing.assert_close(torch.autograd.grad(packed, qkv, dout), torch.autograd.grad(apart, qkv, dout))


def test_rows_that_are_one_document_each_need_no_cu_seqlens(strategy: AttentionStrategy) -> None:
    qkv = random_qkv()
    rows = torch.tensor([0, NUM_TOKENS, 2 * NUM_TOKENS, 2 * NUM_TOKENS], dtype=torch.int32)
    torch.testing.assert_close(strategy(*qkv, softmax_scale=0.3, cu_seqlens=rows), strategy(*qkv, softmax_scale=0.3))


def test_a_later_chunk_never_reaches_an_output(strategy: AttentionStrategy) -> None:
    qkv = [x.detach() for x in random_qkv()]
    before = strategy(*qkv, softmax_scale=0.3)
    for x in qkv:
        x[:, :, 48:] = torch.randn_like(x[:, :, 48:])
    after = strategy(*qkv, softmax_scale=0.3)
    assert torch.equal(before[:, :, :48], after[:, :, :48])
    assert not torch.equal(before[:, :, 48:], after[:, :, 48:])


def test_any_strides(strategy: AttentionStrategy) -> None:
    qkv = [x.detach() for x in random_qkv()]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    torch.testing.assert_close(strategy(*strided, softmax_scale=0.3), strategy(*qkv, softmax_scale=0.3))


@pytest.mark.parametrize("lengths", [[1], [16], [17], [60], [5, 40, 1]])
def test_pairs_are_those_of_each_document(strategy: AttentionStrategy, lengths: list[int]) -> None:
    assert strategy.pairs(lengths) == sum(strategy.pairs([length]) for length in lengths)
    assert strategy.pairs([*lengths, 1]) > strategy.pairs(lengths) > 0


def test_pairs_of_a_long_document_are_fewer_than_those_of_dense(strategy: AttentionStrategy) -> None:
    if not isinstance(strategy, Dense):
        assert strategy.pairs([4096]) < 0.8 * Dense(0).pairs([4096])


@pytest.mark.parametrize(("make", "summary_cluster"), [(Muse, None), (SpatialBlocks, SMALL["Muse"]["key_cluster"])])
def test_pairs_of_muse_are_the_operators(make: type[Muse], summary_cluster: int | None) -> None:
    options = MuseOptions(**SMALL["Muse"], summary_cluster=summary_cluster)
    expected = muse_pairs(60, options).training + muse_pairs(7, options).training
    assert make(0, **SMALL["Muse"]).pairs([60, 7]) == expected


@pytest.mark.parametrize("make", [Muse, SpatialBlocks], ids=lambda cls: cls.__name__)
def test_defaults_are_the_operators(make: type[Muse]) -> None:
    operator = {field.name: field.default for field in dataclasses.fields(MuseOptions)}
    for name, parameter in inspect.signature(make).parameters.items():
        if name != "layer_idx":
            assert parameter.default == operator[name], name


@pytest.mark.parametrize("length", [1, 15, 16, 17, 60])
def test_pairs_of_dense_and_of_the_window_by_counting(length: int) -> None:
    positions = torch.arange(length)
    age = positions[:, None] - positions
    assert Dense(0).pairs([length]) == (age >= 0).sum()
    assert SlidingWindow(0, window=16).pairs([length]) == ((age >= 0) & (age < 16)).sum()


@pytest.mark.parametrize("window", [1, 7, 16, 59, 60, 61, 1000])
def test_the_window_is_a_true_sliding_window(window: int) -> None:
    qkv = random_qkv()
    out = SlidingWindow(0, window=window)(*qkv, softmax_scale=0.3)
    expected = exact_by_loop(*qkv, sees=lambda query, key: (key <= query) & (query - key < window))
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(expected, qkv, dout))


def test_dense_is_softmax_attention() -> None:
    qkv = random_qkv()
    torch.testing.assert_close(
        Dense(0)(*qkv, softmax_scale=0.3), exact_by_loop(*qkv, sees=lambda query, key: key <= query)
    )


def test_dense_never_makes_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, sdpa = [], F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        masks.append(kwargs.get("attn_mask"))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    Dense(0)(*random_qkv(), softmax_scale=0.3)
    Dense(0)(*random_qkv(), softmax_scale=0.3, cu_seqlens=CU_SEQLENS)
    assert len(masks) == 5  # one for the batch, four for the documents that are not empty
    assert masks == [None] * 5


def test_spatial_blocks_see_plain_means_of_contiguous_blocks() -> None:
    """Against the definition written out: own chunk exact, earlier blocks of 4 tokens as (mean k, mean v, log 4)."""
    q, k, v = random_qkv(batch=1)
    strategy = SpatialBlocks(0, chunk=16, query_cluster=4, key_cluster=4, top_k=0, exact_below=0)
    out = strategy(q, k, v, softmax_scale=0.3)
    for i in (0, 15, 16, 37, 59):
        own = i // 16 * 16
        for head in range(4):
            keys, values = k[0, head // 2], v[0, head // 2]
            means = [x[:own].unflatten(0, (-1, 4)).mean(1) for x in (keys, values)]
            logits = torch.cat([keys[own : i + 1], means[0]]) @ q[0, head, i] * 0.3
            logits[i + 1 - own :] += torch.tensor(4.0).log()
            expected = logits.softmax(-1) @ torch.cat([values[own : i + 1], means[1]])
            torch.testing.assert_close(out[0, head, i], expected)


@pytest.mark.parametrize("make", [Muse, SpatialBlocks], ids=lambda cls: cls.__name__)
def test_muse_passes_its_options_on(make: type[Muse]) -> None:
    """Enough retrieved clusters make either exact, so that a lost option would show."""
    qkv = random_qkv()
    options = {**SMALL["Muse"], "top_k": 1000}
    torch.testing.assert_close(make(0, **options)(*qkv, softmax_scale=0.3), Dense(0)(*qkv, softmax_scale=0.3))


def test_muse_warns_once_when_everything_is_exact() -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    with pytest.warns(
        UserWarning,
        match=r"Muse attends rows without documents exactly at this context: data.seq_len=112 .* exact_below=112",
    ):
        Muse(0, chunk=16, query_cluster=4, key_cluster=4).check(seq_len=112, **sizes)


def test_muse_does_not_warn_otherwise(recwarn: pytest.WarningsRecorder) -> None:
    strategy = Muse(0, chunk=16, query_cluster=4, key_cluster=4)
    strategy.check(seq_len=113, num_heads=4, num_kv_heads=2, head_dim=8)
    assert not recwarn.list


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_cudnn_is_left_out_where_determinism_is_asked_for(is_asked_for: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[SDPBackend] = []

    def sdpa_kernel(backends: list[SDPBackend], set_priority: bool) -> nullcontext[None]:
        given.extend(backends)
        return nullcontext()

    monkeypatch.setattr("muse_lightning.attention.dense.sdpa_kernel", sdpa_kernel)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: is_asked_for)
    Dense(0)(*random_qkv(), softmax_scale=0.3)
    assert (SDPBackend.CUDNN_ATTENTION in given) is not is_asked_for
    assert SDPBackend.FLASH_ATTENTION in given
