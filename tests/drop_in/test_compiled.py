"""Layers and models under torch.compile, against the same without it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, StaticCache

from muse_lightning.drop_in import register_with_transformers
from tests.assertions import relative_error
from tests.drop_in.examples import (
    APPROXIMATE,
    BATCHES,
    LENGTH,
    TOLERANCE,
    make_model,
    padded_documents,
    padding_mask,
    prefilled,
    restarting,
)


def compiled_layer(
    mask: str, position_ids: Tensor, name: str = "muse"
) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """q, k, v of two rows, the attention of a layer, and the same as one graph."""
    model = make_model("llama")
    attend, layer = AttentionInterface()[name], model.model.layers[0].self_attn
    documents = torch.tensor([0, 9, 70, 140] + [140] * 61, dtype=torch.int32)[None, None, None]
    is_padding = torch.zeros_like(documents)
    is_padding[..., 0] = 1
    given = {"none": None, "documents": documents, "padding": torch.cat([documents, is_padding], dim=2)}[mask]
    qkv = [torch.randn(2, heads, LENGTH, 8, requires_grad=True) for heads in (4, 2, 2)]

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(layer, q, k, v, given, scaling=0.3, position_ids=position_ids)[0] * 2

    torch._dynamo.reset()
    return qkv, attended, torch.compile(attended, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("mask", ["none", "documents", "padding"])
def test_a_compiled_layer_is_one_graph(mask: str) -> None:
    position_ids = torch.arange(LENGTH).repeat(2, 1)
    if mask != "none":  # where the mask has it, too
        position_ids[0, 9:] -= 9
    qkv, attended, compiled = compiled_layer(mask, position_ids)
    expected, actual = attended(*qkv), compiled(*qkv)
    torch.testing.assert_close(actual, expected)
    dout = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, qkv, dout), torch.autograd.grad(expected, qkv, dout))


def test_a_compiled_layer_with_exact_heads_is_one_graph() -> None:
    register_with_transformers("muse_heads", **APPROXIMATE, exact_heads={0: [1]})
    qkv, attended, compiled = compiled_layer("none", torch.arange(LENGTH).repeat(2, 1), "muse_heads")
    expected, actual = attended(*qkv), compiled(*qkv)
    torch.testing.assert_close(actual, expected)
    dout = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, qkv, dout), torch.autograd.grad(expected, qkv, dout))


@pytest.mark.parametrize("mask", ["none", "documents", "padding"])
def test_a_compiled_layer_refuses_documents_that_the_mask_does_not_have(mask: str) -> None:
    position_ids = torch.arange(LENGTH).repeat(2, 1)
    position_ids[1, 30:] -= 30
    qkv, attended, compiled = compiled_layer(mask, position_ids)
    before = attended(*qkv)
    with torch.no_grad():
        qkv[2][1, :, :30] += 1
    torch.testing.assert_close(attended(*qkv)[1, 30:], before[1, 30:], rtol=0, atol=0)
    message = (
        r'^attn_implementation="muse" under torch\.compile accepts position_ids that start again only with '
        r"use_cache=False and without attention_mask$"
    )
    with pytest.raises(ValueError, match=message):
        compiled(*qkv)


@pytest.mark.slow
def test_a_compiled_decoding_step_is_one_graph() -> None:
    model, input_ids = make_model("llama"), torch.randint(64, (2, LENGTH))
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 10)
    prefilled(model, "muse", input_ids, cache)
    # transformers 4 needs to be told the place, for a compiled step.
    batch = {"use_cache": True, "cache_position": torch.tensor([LENGTH])}
    logits = [prefilled(model, "sdpa", input_ids[:, :1], copy.deepcopy(cache), **batch)]
    model.set_attn_implementation("muse")
    step = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        logits.append(step(input_ids[:, :1], past_key_values=cache, **batch).logits)
    torch.testing.assert_close(*logits, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [BATCHES["left"], BATCHES["packed"]], ids=["left", "packed"])
def test_a_compiled_model_gives_the_same(batch: dict[str, Any]) -> None:
    model, input_ids = make_model("llama"), torch.randint(64, (len(next(iter(batch.values()))), LENGTH))
    model.set_attn_implementation("muse")
    batch = batch | {"use_cache": False}
    torch._dynamo.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    with torch.no_grad():
        expected = model(input_ids, **batch).logits
        actual = torch.compile(model, backend="aot_eager")(input_ids, **batch).logits
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert breaks, "nothing was compiled"
    assert all("disable" in reason for reason in breaks), "breaks elsewhere than where the mask is made"


COMPILED: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "all-ones": ({"attention_mask": padding_mask((0, 70))}, True),
    "left": ({"attention_mask": padding_mask((9, 70))}, True),
    "packed": ({"position_ids": restarting()}, False),
    "packed-padded": (padded_documents(0, 60, 0), False),
}
"""Batches of a model with a cache, and whether they are accepted under torch.compile."""


WITH_INDUCTOR = ("left", "packed-padded")
"""What is compiled to the end each time; the others by the exhaustive tests."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager") for name in COMPILED),
        *((name, "inductor") for name in WITH_INDUCTOR),
        *(
            pytest.param(name, "inductor", marks=pytest.mark.exhaustive)
            for name in COMPILED
            if name not in WITH_INDUCTOR
        ),
    ],
)
def test_a_compiled_model_mixes_no_documents(name: str, backend: str) -> None:
    batch, is_accepted = COMPILED[name]
    model = make_model("llama", num_hidden_layers=1).train()
    model.set_attn_implementation("muse")
    input_ids = torch.randint(64, (max([1, *map(len, batch.values())]), LENGTH))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    if not is_accepted:
        with pytest.raises(ValueError, match="accepts position_ids that start again only with use_cache=False"):
            compiled(input_ids, **batch)
        return
    is_text, gradients = batch.get("attention_mask", torch.ones_like(input_ids)).bool(), []
    for call in (model, compiled):
        model.zero_grad()
        call(input_ids, labels=input_ids.masked_fill(~is_text, -100), **batch).loss.backward()
        gradients.append(torch.cat([x.grad.flatten() for x in model.parameters()]))
    # Inductor computes the sines of RoPE, which are float32, in its own way.
    assert relative_error(gradients[1], gradients[0]) < 1e-4
