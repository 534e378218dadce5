"""Attention without approximation: of all layers, and of some."""

from collections.abc import Sequence

import pytest
import torch

from muse_lightning.attention import Dense, Muse, SlidingWindow, exact_attention, exact_in
from muse_lightning.errors import UserError
from muse_lightning.measure.flops import attention_flops_per_token
from tests.tiny import SEQ_LEN, batches, tiny_model, tiny_muse


@pytest.mark.parametrize(("window", "length"), [(None, 30), (4, 30)])
def test_exact_attention_of_a_window(window: int | None, length: int) -> None:
    strategy = exact_attention(window)(3)
    assert strategy.layer_idx == 3
    expected = Dense(3) if window is None else SlidingWindow(3, window=4)
    assert strategy.pairs([length]) == expected.pairs([length])
    qkv = torch.randn(3, 1, 2, length, 8)
    assert torch.equal(strategy(*qkv, softmax_scale=0.3), expected(*qkv, softmax_scale=0.3))


@pytest.mark.parametrize(
    ("layers", "exact"),
    [((), []), ((0,), [0]), ((-1,), [4]), ((0, -1), [0, 4]), ((4, -1, -5), [0, 4]), ((2, 1), [1, 2])],
)
@pytest.mark.parametrize("window", [None, 8])
def test_exact_layers(layers: Sequence[int], exact: list[int], window: int | None) -> None:
    attention = exact_in(layers, Muse, num_layers=5, window=window)
    strategies = [attention(layer) for layer in range(5)]
    kind = Dense if window is None else SlidingWindow
    assert [type(s) for s in strategies] == [kind if layer in exact else Muse for layer in range(5)]
    assert [s.layer_idx for s in strategies] == list(range(5))
    assert all(s.window == window for s in strategies if isinstance(s, SlidingWindow))


@pytest.mark.parametrize("layer", [5, -6, 99])
def test_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(
        UserError, match=rf"exact_layers names layer {layer}; accepted: 0 to 4, or from the end -1 to -5"
    ):
        exact_in([0, layer], Muse, num_layers=5, window=None)


def test_a_model_of_both() -> None:
    muse, both, exact = (
        tiny_model(attention=tiny_muse, **options)
        for options in ({}, {"exact_layers": (-1,)}, {"exact_layers": (0, 1)})
    )
    for model in (muse, both, exact):
        torch.manual_seed(0)
        model.configure_model()
    [batch] = batches(1, packed=False)
    with muse.llama.attention_as(lambda layer: Dense(layer) if layer == 1 else tiny_muse(layer)):
        wanted = muse.token_nats(batch)
    nats = [model.token_nats(batch) for model in (muse, both)]
    assert torch.equal(nats[1], wanted)
    assert not torch.equal(nats[0], wanted)
    flops = [attention_flops_per_token(model.llama, [SEQ_LEN]) for model in (muse, both, both.twin(), exact)]
    assert flops[1] == flops[2] == pytest.approx((flops[0] + flops[3]) / 2)
    assert flops[0] != flops[3]
