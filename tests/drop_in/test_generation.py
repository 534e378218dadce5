"""Prefill and decoding with caches, against transformers' own exact attention."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.assertions import relative_error
from tests.drop_in.examples import (
    LENGTH,
    TOLERANCE,
    make_model,
    padding_mask,
    prefilled,
)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", ["llama", "qwen2-windows", "qwen3", "mistral-window"])
def test_greedy_generation_is_that_of_exact_attention(name: str, is_padded: bool, cache: str | None) -> None:
    model = make_model(name)
    input_ids = torch.randint(64, (2, LENGTH))
    mask = padding_mask((9, 70), (0, 70)) if is_padded else torch.ones_like(input_ids)
    generated = []
    for attention in ("muse_exact", "sdpa"):
        model.set_attn_implementation(attention)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        generated.append(model.generate(input_ids, attention_mask=mask, cache_implementation=cache, **options))
    assert torch.equal(*generated)
    assert generated[0].shape == (2, LENGTH + 12)


def test_generation_from_one_token() -> None:
    model, input_ids, generated = make_model("llama"), torch.tensor([[7]]), []
    for attention, cache in (("sdpa", None), ("muse", None), ("muse", "static")):
        model.set_attn_implementation(attention)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        generated.append(model.generate(input_ids, cache_implementation=cache, **options))
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0], generated[2])


@pytest.mark.parametrize("name", ["llama", "qwen2-windows", "mistral-window"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "left-padded"])
def test_a_prefill_in_parts_is_exact_after_the_first(name: str, is_padded: bool) -> None:
    model, input_ids = make_model(name), torch.randint(64, (2, LENGTH))
    mask = padding_mask((9, 70), (0, 70)) if is_padded else torch.ones_like(input_ids)
    first = DynamicCache(config=model.config)
    prefilled(model, "muse", input_ids[:, :40], first, attention_mask=mask[:, :40])
    logits = []
    for attention in ("muse", "sdpa"):
        cache = copy.deepcopy(first)
        parts = [
            prefilled(model, attention, input_ids[:, start:end], cache, attention_mask=mask[:, :end])
            for start, end in ((40, 60), (60, 61), (61, 70))
        ]
        logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*logits, **TOLERANCE)


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_prefill_is_approximate_and_with_a_static_cache_the_same(name: str, is_padded: bool) -> None:
    model, input_ids = make_model(name), torch.randint(64, (2, LENGTH))
    batch = {"attention_mask": padding_mask((9, 70), (0, 70))} if is_padded else {}
    is_text = batch.get("attention_mask", torch.ones_like(input_ids)).bool()
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 10)]
    dynamic, static = (prefilled(model, "muse", input_ids, cache, **batch)[is_text] for cache in caches)
    torch.testing.assert_close(static, dynamic, **TOLERANCE)
    exact = prefilled(model, "sdpa", input_ids, DynamicCache(config=model.config), **batch)[is_text]
    assert relative_error(dynamic, exact) > 1e-2
