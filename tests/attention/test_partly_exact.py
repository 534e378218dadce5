"""Some heads attend exactly beside another strategy."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import Dense, Muse, SlidingWindow, describe_layers, kind_of
from muse_lightning.attention.base import AttentionStrategy
from muse_lightning.attention.partly_exact import PartlyExact, choose_heads, partly_exact_in
from muse_lightning.errors import UserError
from muse_lightning.measure.flops import attention_flops_per_token
from tests.tiny import SEQ_LEN, batches, tiny_model, tiny_muse

KV_HEADS, GROUP = 3, 2


class ByPlace(AttentionStrategy):
    """The first half of the heads sees a window, the others everything."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        halves = zip((Dense(0), SlidingWindow(0, window=5)), *(x.chunk(2, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([part(*qkv, **options) for part, *qkv in halves], dim=1)

    def pairs(self, lengths: Sequence[int], *, has_documents: bool = False) -> float:
        return Dense(0).pairs(lengths)


def windowed(layer: int) -> AttentionStrategy:
    return SlidingWindow(layer, window=5)


@pytest.mark.parametrize("heads", [(), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("has_documents", [False, True])
def test_each_head_has_its_own_attention(heads: tuple[int, ...], has_documents: bool) -> None:
    q, k, v = (
        torch.randn(2, number, 24, 8, dtype=torch.float64, requires_grad=True)
        for number in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    cu_seqlens = torch.tensor([0, 9, 24, 31, 48, 48], dtype=torch.int32) if has_documents else None
    options = {"softmax_scale": 0.3, "cu_seqlens": cu_seqlens}
    exact, others = Dense(0)(q, k, v, **options), windowed(0)(q, k, v, **options)
    is_exact = torch.tensor([head in heads for head in range(KV_HEADS)]).repeat_interleave(GROUP)[:, None, None]
    wanted = torch.where(is_exact, exact, others)
    out = PartlyExact(windowed(0), Dense(0), KV_HEADS, heads)(q, k, v, **options)
    torch.testing.assert_close(out, wanted)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), cotangent)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, (q, k, v), cotangent))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(1,), (0, 2)])
def test_heads_by_kernels(heads: tuple[int, ...]) -> None:
    """Forward and backward, in half precision: each head is what it would be in a layer that is all of its kind."""
    q, k, v = (
        torch.randn(1, number, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for number in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    muse, dense = Muse(0, chunk=1024, exact_below=0), Dense(0)
    cotangent = torch.randn_like(q)

    def run(strategy: AttentionStrategy) -> list[Tensor]:
        out = strategy(q, k, v, softmax_scale=0.125)
        found = [out, *torch.autograd.grad(out, (q, k, v), cotangent)]
        return [x.unflatten(1, (KV_HEADS, -1)) for x in found]

    whole = {True: run(dense), False: run(muse)}
    for index, found in enumerate(run(PartlyExact(muse, dense, KV_HEADS, heads))):
        for head in range(KV_HEADS):
            torch.testing.assert_close(found[:, head], whole[head in heads][index][:, head], atol=2e-2, rtol=2e-2)


def test_which_heads_are_exact_may_change() -> None:
    q, k, v = (torch.randn(1, number, 24, 8) for number in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    strategy = PartlyExact(windowed(0), Dense(0), KV_HEADS, (0,))
    before = strategy(q, k, v, softmax_scale=0.3)
    strategy.heads = (2,)
    after = strategy(q, k, v, softmax_scale=0.3)
    differs = (before != after).any(dim=(0, 2, 3)).view(KV_HEADS, GROUP).all(1)
    assert differs.tolist() == [True, False, True]


def spread(count: int, exact_layers: Sequence[int]) -> list[AttentionStrategy]:
    factory = partly_exact_in(
        count, windowed, exact_layers=set(exact_layers), num_layers=4, num_kv_heads=KV_HEADS, window=None
    )
    return [factory(layer) for layer in range(4)]


@pytest.mark.parametrize(
    ("count", "exact_layers", "heads"),
    [
        (0, (), {}),
        (1, (), {0: (0,), 1: (), 2: (), 3: ()}),
        (4, (), {0: (0,), 1: (0,), 2: (0,), 3: (0,)}),
        (6, (), {0: (0, 2), 1: (1,), 2: (0, 2), 3: (1,)}),
        (12, (), dict.fromkeys(range(4), (0, 1, 2))),
        (2, (0, 3), {1: (0,), 2: (0,)}),
    ],
)
def test_at_first_they_are_spread(count: int, exact_layers: Sequence[int], heads: dict[int, tuple[int, ...]]) -> None:
    strategies = spread(count, exact_layers)
    assert [strategy.layer_idx for strategy in strategies] == [0, 1, 2, 3]
    assert {s.layer_idx: s.heads for s in strategies if isinstance(s, PartlyExact)} == heads
    assert all(isinstance(s, PartlyExact | SlidingWindow) for s in strategies)


@pytest.mark.parametrize(
    ("count", "exact_layers", "most"), [(13, (), 12), (4, (1, 2, 3), 3), (1, range(4), 0), (-1, (), 12)]
)
def test_a_number_that_there_is_not(count: int, exact_layers: Sequence[int], most: int) -> None:
    with pytest.raises(UserError, match=rf"^model.exact_heads is {count}; accepted: 0 to {most}, the key-value heads"):
        spread(count, exact_layers)


def test_exact_means_the_window_of_the_model() -> None:
    model = tiny_model(attention=tiny_muse, exact_heads=2, config={"sliding_window": 7})
    assert [type(s.exact) for s in model.partly_exact] == [SlidingWindow] * 2
    assert [s.exact.window for s in model.partly_exact if isinstance(s.exact, SlidingWindow)] == [7, 7]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_work_is_that_of_each_head(count: int) -> None:
    muse, exact, both = (
        tiny_model(**options)
        for options in ({"attention": tiny_muse}, {}, {"attention": tiny_muse, "exact_heads": count})
    )
    flops = [attention_flops_per_token(model.llama, [SEQ_LEN]) for model in (muse, exact, both)]
    assert flops[0] != flops[1]
    assert flops[2] == pytest.approx(flops[0] + (flops[1] - flops[0]) * count / 4)


def test_all_heads_exact_is_exact_attention() -> None:
    exact, all_heads, some = (tiny_model(attention=tiny_muse, exact_heads=n) for n in (4, 4, 3))
    for model in (exact, all_heads, some):
        torch.manual_seed(0)
        model.configure_model()
    exact.llama.set_attention(Dense)
    [batch] = batches(1, packed=False)
    nats = [model.token_nats(batch) for model in (exact, all_heads, some)]
    assert torch.equal(nats[0], nats[1])
    assert not torch.equal(nats[0], nats[2])


def test_heads_must_be_alike() -> None:
    line = "model.exact_heads: ByPlace does not say that it attends every head alike; accepted with it: 0, or heads_are"
    with pytest.raises(UserError, match=line):
        tiny_model(attention=ByPlace, exact_heads=1)
    assert tiny_model(attention=ByPlace, exact_heads=0).partly_exact == []
    said = type("Said", (ByPlace,), {"heads_are_alike": True})
    assert len(tiny_model(attention=said, exact_heads=1).partly_exact) == 2


def test_it_checks_the_other_strategy() -> None:
    class Unfinished(AttentionStrategy):
        heads_are_alike = True

    with pytest.raises(UserError, match=r"Unfinished has no forward\(\)"):
        tiny_model(attention=Unfinished, exact_heads=1)


def test_in_words() -> None:
    model = tiny_model(attention=Muse, exact_layers=(0,), exact_heads=3, config={"num_hidden_layers": 4})
    strategies = [block.self_attn.attention for block in model.llama.blocks]
    assert describe_layers(strategies) == "Muse(chunk=2048, top_k=12), Dense in layer 0, 3 of 6 key-value heads exact"
    assert [kind_of(strategy) for strategy in strategies] == ["Dense", *["Muse beside 1 exact key-value head"] * 3]
    model.partly_exact[0].heads = (0, 1)
    assert kind_of(strategies[1]) == "Muse beside 2 exact key-value heads"


@pytest.mark.parametrize(
    ("errors", "before", "after"),
    [
        ([[0.1, 0.4], [0.3, 0.2]], [(0,), (0,)], [(1,), (0,)]),
        ([[0.4, 0.3], [0.2, 0.1]], [(0,), (0,)], [(0, 1), ()]),
        ([[0.1, 0.2], [0.3, 0.4]], [(0, 1), (0,)], [(1,), (0, 1)]),
        ([[0.0, 0.0], [0.0, 0.0]], [(1,), (1,)], [(1,), (1,)]),
        ([[0.5, 0.5], [0.5, 0.5]], [(), (0, 1)], [(), (0, 1)]),
        ([[0.0, 0.0], [0.1, 0.0]], [(1,), (1,)], [(1,), (0,)]),
    ],
)
def test_the_largest_errors_are_chosen(
    errors: list[list[float]], before: list[tuple[int, ...]], after: list[tuple[int, ...]]
) -> None:
    strategies = [PartlyExact(windowed(layer), Dense(layer), 2, heads) for layer, heads in enumerate(before)]
    choose_heads(strategies, torch.tensor(errors))
    assert [strategy.heads for strategy in strategies] == after


@pytest.mark.parametrize("count", range(8))
def test_work_that_is_exact_anyway_is_counted_as_such(count: int) -> None:
    """To the last bit: who compares counts takes it for exact attention."""
    strategy = PartlyExact(SlidingWindow(0, window=1000), Dense(0), 7, range(count))
    assert strategy.pairs([1000]) == Dense(0).pairs([1000])
