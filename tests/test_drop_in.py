"""MuSe attention inside transformers, against transformers' own exact attention and against the operator itself."""

import copy
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from muse_kernels import muse_attention
from muse_lightning.attention import Muse
from muse_lightning.drop_in import register_with_transformers
from tests.assertions import assert_as_accurate, relative_error

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from 0, so that attention is far from uniform
}
BOTH_KINDS = {"use_sliding_window": True, "sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": ("Qwen2", BOTH_KINDS),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-windows": ("Qwen3", {"head_dim": 16} | BOTH_KINDS),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 24}),
    "mistral-wide-window": ("Mistral", {"sliding_window": 128}),
}
APPROXIMATE: dict[str, Any] = {"chunk": 16, "query_cluster": 4, "key_cluster": 4, "top_k": 1, "exact_below": 0}
LENGTH = 70
DOCUMENTS = [11, 36, 23]
"""Lengths of packed documents; two of them are longer than a chunk."""
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
"""In float64."""

Recorder = list[SimpleNamespace]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """ "muse", which approximates every row in these tests, and "muse_exact", which none."""
    mappings = [interface._global_mapping for interface in (AttentionInterface, AttentionMaskInterface)]
    before = copy.copy(mappings[0]), copy.copy(mappings[1])
    register_with_transformers(**APPROXIMATE, implementation="reference")
    register_with_transformers("muse_exact", **(APPROXIMATE | {"exact_below": 10 * LENGTH}), implementation="reference")
    yield
    for mapping, content in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(content)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What "muse" is called with and returns, a layer after the other."""
    calls: Recorder = []
    attend = AttentionInterface()["muse"]

    def recorded(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **others: Any) -> Any:
        out, weights = attend(module, q, k, v, mask, **others)
        calls.append(SimpleNamespace(module=module, q=q, k=k, v=v, mask=mask, others=others, out=out))
        return out, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "muse", recorded)
    return calls


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    kind, special = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | special | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model.double().eval()


def padding_mask(*rows: tuple[int, int]) -> Tensor:
    """int64 [B, LENGTH]: each row is text from one place to another."""
    place = torch.arange(LENGTH)
    return torch.stack([(place >= start) & (place < end) for start, end in rows]).long()


def restarting() -> Tensor:
    return torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


BATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing-padded": {"attention_mask": padding_mask((0, 70), (0, 70))},
    "left": {"attention_mask": padding_mask((9, 70), (40, 70))},
    "right": {"attention_mask": padding_mask((0, 61), (0, 70))},
    "both": {"attention_mask": padding_mask((0, 40), (5, 50))},
    "packed": {"position_ids": restarting(), "use_cache": False},
    "packed-rows": {
        "position_ids": torch.cat([restarting(), torch.arange(LENGTH)[None]]),
        "use_cache": False,
    },
}


def run(model: PreTrainedModel, attention: str, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of text, and the gradient of every parameter."""
    model.set_attn_implementation(attention)
    rows = max([1, *(len(batch[name]) for name in ("attention_mask", "position_ids") if name in batch)])
    torch.manual_seed(1)
    input_ids = torch.randint(SIZES["vocab_size"], (rows, LENGTH))
    is_text = batch.get("attention_mask", torch.ones_like(input_ids)).bool()
    labels = torch.where(is_text, input_ids, -100)
    model.zero_grad()
    output = model(input_ids, labels=labels, **batch)
    output.loss.backward()
    return output.logits[is_text].detach(), {name: x.grad.clone() for name, x in model.named_parameters()}


def assert_same(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(actual[0], expected[0], **TOLERANCE)
    torch.testing.assert_close(actual[1], expected[1], **TOLERANCE)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_exact_attention(name: str, batch: dict[str, Any]) -> None:
    model = make_model(name)
    assert_same(run(model, "muse_exact", batch), run(model, "sdpa", batch))


@pytest.mark.parametrize("batch", [BATCHES["left"], BATCHES["packed"]], ids=["left", "packed"])
@pytest.mark.parametrize("name", ["llama", "qwen3-windows"])
def test_gradient_checkpointing_changes_nothing(name: str, batch: dict[str, Any]) -> None:
    model = make_model(name).train()
    for attention, reference in (("muse_exact", "sdpa"), ("muse", "muse")):
        model.gradient_checkpointing_disable()
        expected = run(model, reference, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same(run(model, attention, batch), expected)


@pytest.mark.parametrize("use_cache", [False, True], ids=["without-a-cache", "with-a-cache"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_packed_documents_by_their_boundaries(name: str, dtype: torch.dtype, use_cache: bool) -> None:
    model = make_model(name)
    boundaries = torch.tensor([0, *DOCUMENTS], dtype=dtype).cumsum(0, dtype=dtype)
    actual = run(model, "muse_exact", {"cu_seq_lens_q": boundaries, "use_cache": use_cache})
    expected = run(model, "sdpa", BATCHES["packed"])
    # RoPE is relative: positions that go on mean the same as positions that start again, but for sines in float32.
    assert relative_error(actual[0], expected[0]) < 1e-5
    for parameter, gradient in expected[1].items():
        assert relative_error(actual[1][parameter], gradient) < 1e-4, parameter


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_positions_count_although_there_is_a_cache(name: str) -> None:
    model = make_model(name)
    actual = run(model, "muse_exact", {"position_ids": restarting(), "use_cache": True})
    assert_same(actual, run(model, "sdpa", BATCHES["packed"]))


def test_positions_that_repeat_start_no_document() -> None:
    model, positions = make_model("llama"), torch.arange(LENGTH)[None]
    batch = {"position_ids": torch.where((positions > 20) & (positions < 40), 20, positions), "use_cache": True}
    assert_same(run(model, "muse_exact", batch), run(model, "sdpa", batch))
    starts_twice = {"position_ids": (positions - 1).clamp_min(0)}
    expected = run(model, "sdpa", starts_twice | {"use_cache": False})
    assert_same(run(model, "muse_exact", starts_twice | {"use_cache": True}), expected)


def test_positions_written_into_the_same_tensor_are_seen() -> None:
    model, position_ids = make_model("llama"), torch.arange(LENGTH)[None].clone()
    for _ in range(2):
        batch = {"position_ids": position_ids, "use_cache": True}
        assert_same(run(model, "muse_exact", batch), run(model, "sdpa", batch | {"use_cache": False}))
        position_ids.copy_(restarting())


PADDED: dict[str, tuple[int, int, int]] = {
    "right": (0, 60, 0),
    "right-of-ones": (0, 60, 1),
    "left-of-ones": (8, 70, 1),
    "left-of-zeros": (8, 70, 0),
    "both": (5, 62, 1),
}
"""Where the text of the second row is, and what position padding has."""


def padded_documents(start: int, end: int, position_of_padding: int) -> dict[str, Any]:
    """Rows of three documents: one without padding, and one between `start` and `end`."""
    mask, positions = padding_mask((0, LENGTH), (start, end)), restarting().repeat(2, 1)
    positions[1, start:end] = restarting()[0, : end - start]
    return {"attention_mask": mask, "position_ids": positions.masked_fill(mask == 0, position_of_padding)}


@pytest.mark.parametrize("use_cache", [False, True], ids=["without-a-cache", "with-a-cache"])
@pytest.mark.parametrize("padded", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("name", ["llama", "qwen3-windows"])
def test_packed_documents_between_padding(name: str, padded: tuple[int, int, int], use_cache: bool) -> None:
    model, batch = make_model(name), padded_documents(*padded) | {"use_cache": use_cache}
    is_text, positions = batch["attention_mask"].bool(), batch["position_ids"]
    document = (positions == 0).cumsum(1)
    place = torch.arange(LENGTH)
    sees = (document[:, :, None] == document[:, None]) & (place[:, None] >= place) & is_text[:, None]
    # Padding sees itself: rows without a key are undefined in transformers.
    pairs = (sees | torch.eye(LENGTH, dtype=torch.bool))[:, None]
    exact: dict[str, Any] = {"attention_mask": pairs}
    if "windows" in name:
        in_window = (place[:, None] - place < 24)[None, None]
        exact = {"attention_mask": {"full_attention": pairs, "sliding_attention": pairs & in_window}}
    torch.manual_seed(1)
    input_ids = torch.randint(SIZES["vocab_size"], (2, LENGTH))
    results = []
    for attention, given in (("muse_exact", batch), ("sdpa", batch | exact)):
        model.set_attn_implementation(attention)
        model.zero_grad()
        logits = model(input_ids, **given).logits[is_text]
        logits.square().mean().backward()
        results.append((logits.detach(), {name: x.grad.clone() for name, x in model.named_parameters()}))
    assert_same(*results)


def test_padding_is_one_document_whatever_its_positions(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each of its tokens, whose positions are all alike."""
    model, documents = make_model("llama"), []
    attend = Muse.forward

    def counted(self: Muse, *qkv: Tensor, cu_seqlens: Tensor, **others: Any) -> Tensor:
        documents.append(int((cu_seqlens.diff() > 0).sum()))
        return attend(self, *qkv, cu_seqlens=cu_seqlens, **others)

    monkeypatch.setattr(Muse, "forward", counted)
    run(model, "muse", padded_documents(40, 70, 1))
    assert documents == [3 + 1 + 2] * 2


def test_boundaries_between_padding_are_refused() -> None:
    model = make_model("llama")
    model.set_attn_implementation("muse")
    batch = {"attention_mask": padding_mask((0, 60)), "cu_seq_lens_q": torch.tensor([0, 30, 70])}
    with pytest.raises(ValueError, match="cu_seq_lens_q without padding, got both"):
        model(torch.randint(64, (1, LENGTH)), **batch)


@pytest.mark.parametrize("how", ["cu_seq_lens_q", "position_ids"])
def test_documents_of_a_mask_are_kept_beside_others(how: str) -> None:
    """A mask may be given twice, as by chunked attention, with other documents."""
    layer, chunks = make_model("llama").model.layers[0].self_attn, torch.tensor([0, 32, 64] + [LENGTH] * 62)
    mask = chunks.to(torch.int32)[None, None, None]
    qkv = [torch.randn(1, heads, LENGTH, 8) for heads in (4, 2, 2)]
    for cut in (20, 50):
        given = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])[None]
        if how == "cu_seq_lens_q":
            given = torch.tensor([0, cut, LENGTH])
        out, _ = AttentionInterface()["muse_exact"](layer, *qkv, mask, **{how: given})
        ends = sorted({0, 32, 64, LENGTH, cut})
        for start, end in itertools.pairwise(ends):
            expected = F.scaled_dot_product_attention(
                *(x[:, :, start:end] for x in qkv), is_causal=True, enable_gqa=True
            )
            torch.testing.assert_close(out[:, start:end].transpose(1, 2), expected)


@pytest.mark.parametrize("use_cache", [False, True], ids=["without-a-cache", "with-a-cache"])
def test_boundaries_and_positions_together(use_cache: bool) -> None:
    """As `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` gives them."""
    model, batch = make_model("llama"), BATCHES["packed"]
    boundaries = torch.tensor([0, *DOCUMENTS]).cumsum(0)
    both = batch | {"cu_seq_lens_q": boundaries, "use_cache": use_cache}
    assert_same(run(model, "muse_exact", both), run(model, "sdpa", batch))


@pytest.mark.parametrize("name", ["llama", "qwen3-windows", "mistral-window"])
def test_autocast(name: str) -> None:
    model = make_model(name).float()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (run(model, attention, BATCHES["left"]) for attention in ("muse_exact", "sdpa"))
    assert relative_error(actual[0], expected[0]) < 0.03
    assert actual[0].dtype == expected[0].dtype
    assert all(torch.isfinite(gradient).all() for gradient in actual[1].values())


# ---------------------------------------------------------------------------------------------- the approximation


SPANS: dict[str, tuple[dict[str, Any], list[list[tuple[int, int]]]]] = {
    "plain": ({}, [[(0, 70)]]),
    "left": (BATCHES["left"], [[(9, 70)], [(40, 70)]]),
    "both": (BATCHES["both"], [[(0, 40)], [(5, 50)]]),
    "packed": (BATCHES["packed"], [[(0, 11), (11, 47), (47, 70)]]),
}
"""By batch, the documents of each row."""


@pytest.mark.parametrize(("batch", "rows"), SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "mistral-wide-window"])
def test_every_layer_is_the_operator_on_each_document(
    name: str, batch: dict[str, Any], rows: list[list[tuple[int, int]]], recorder: Recorder
) -> None:
    model = make_model(name)
    run(model, "muse", batch)
    assert len(recorder) == SIZES["num_hidden_layers"]
    for call in list(recorder):
        inputs = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        out, _ = AttentionInterface()["muse"](call.module, *inputs, call.mask, **call.others)
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, inputs, dout)
        expected, exact = torch.zeros_like(out), torch.zeros_like(out)
        for row, spans in enumerate(rows):
            for start, end in spans:
                document = [x[row, None, :, start:end] for x in inputs]
                scale = {"softmax_scale": call.module.scaling, "implementation": "reference"}
                attended = muse_attention(*document, **APPROXIMATE, **scale)
                expected[row, start:end] = attended[0].transpose(0, 1)
                attended = muse_attention(*document, **(APPROXIMATE | {"exact_below": LENGTH}), **scale)
                exact[row, start:end] = attended[0].transpose(0, 1)
        torch.testing.assert_close(out, expected, **TOLERANCE)
        torch.testing.assert_close(call.out, expected, **TOLERANCE)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, dout), **TOLERANCE)
        assert relative_error(out, exact) > 1e-3  # the approximation has been at work


@pytest.mark.parametrize(("scaling", "softmax_scale"), [(0.7, 0.7), (None, 8**-0.5)])
def test_the_layers_scale_is_used(scaling: float | None, softmax_scale: float) -> None:
    layer = make_model("llama").model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, LENGTH, 8) for heads in (4, 2, 2))
    out, _ = AttentionInterface()["muse"](layer, q, k, v, None, scaling=scaling)
    torch.testing.assert_close(out.transpose(1, 2), muse_attention(q, k, v, **APPROXIMATE, softmax_scale=softmax_scale))


@pytest.mark.parametrize("mask", [padding_mask((9, 70)), padding_mask((0, 61)), padding_mask((0, 0))], ids=str)
def test_padding_gives_zeros_and_gets_zero_gradients(mask: Tensor, recorder: Recorder) -> None:
    model = make_model("llama")
    model.set_attn_implementation("muse")
    model(torch.randint(64, (1, LENGTH)), attention_mask=mask)
    call, is_padding = recorder[0], ~mask[0].bool()
    inputs = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    out, _ = AttentionInterface()["muse"](call.module, *inputs, call.mask, **call.others)
    assert not out[0, is_padding].any()
    for gradient in torch.autograd.grad(
        out, inputs, torch.full_like(out, torch.nan).masked_fill(mask[0, :, None, None].bool(), 1.0)
    ):
        assert not gradient[0, :, is_padding].any()
        assert torch.isfinite(gradient).all()


def test_a_window_is_exact_in_an_approximate_model() -> None:
    model = make_model("mistral-window")
    assert_same(run(model, "muse", BATCHES["both"]), run(model, "sdpa", BATCHES["both"]))


# ----------------------------------------------------------------------------------------------------- generation


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


@pytest.mark.parametrize("has_mask", [False, True])
def test_there_is_no_mask_where_nothing_is_hidden(has_mask: bool, recorder: Recorder) -> None:
    """A row without documents takes the faster kernels, and stays exact for longer."""
    model, cache = make_model("llama"), DynamicCache()
    for start, end in ((0, 60), (60, 61)):
        batch = {"attention_mask": torch.ones(1, end, dtype=torch.long)} if has_mask else {}
        prefilled(model, "muse", torch.randint(64, (1, end - start)), cache, **batch)
    assert [call.mask for call in recorder] == [None] * 4


def prefilled(model: PreTrainedModel, attention: str, input_ids: Tensor, cache: Any, **batch: Any) -> Tensor:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(input_ids, past_key_values=cache, **({"use_cache": True} | batch)).logits


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


# --------------------------------------------------------------------------------------------------------- refusals


def with_hole() -> Tensor:
    mask = padding_mask((0, 70))
    mask[0, 30:35] = 0
    return mask


@pytest.mark.parametrize(
    ("changes", "batch", "message"),
    [
        ({"attention_dropout": 0.1}, {}, r"without dropout 0\.1 of attention weights, which LlamaAttention asks for"),
        ({}, {"attention_mask": with_hole()}, "got padding between the tokens of a row"),
        ({}, {"attention_mask": torch.ones(1, 1, LENGTH, LENGTH).tril().bool()}, "of two dimensions"),
        ({}, {"attention_mask": torch.zeros(1, 1, LENGTH, LENGTH)}, "of two dimensions"),
    ],
    ids=["dropout", "hole", "pairs", "bias"],
)
def test_what_has_no_place_in_muse_is_refused_in_one_line(
    changes: dict[str, Any], batch: dict[str, Any], message: str
) -> None:
    model = make_model("llama", **changes).train()
    model.set_attn_implementation("muse")
    with pytest.raises(ValueError, match=message) as caught:
        model(torch.randint(64, (1, LENGTH)), **batch)
    assert str(caught.value).startswith('attn_implementation="muse" ')
    assert "\n" not in str(caught.value)


MASK_SIZES: dict[str, Any] = {"batch_size": 1, "q_length": LENGTH, "kv_length": LENGTH, "device": "cpu"}


@pytest.mark.parametrize(
    "mask_function",
    [
        lambda batch, head, query, key: query >= 0,
        lambda batch, head, query, key: (key <= query) | (key < 10),
        lambda batch, head, query, key: (key <= query) & ((query - key < 20) | (key == 0)) & (key != 1),
        lambda batch, head, query, key: (key <= query) & (query - key < 20),
    ],
    ids=["bidirectional", "prefix", "one-key-less", "a-window-nobody-named"],
)
def test_other_masks_are_refused(mask_function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="the model asks for another mask"):
        AttentionMaskInterface()["muse"](**MASK_SIZES, mask_function=mask_function)


def test_functions_that_a_model_adds_to_its_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="the model asks for another mask"):
        AttentionMaskInterface()["muse"](**MASK_SIZES, mask_function=causal_mask_function, use_vmap=True)


def test_chunked_attention_is_attention_within_documents() -> None:
    """As in Llama 4: a token sees the tokens of its own chunk."""
    mask = AttentionMaskInterface()["muse"](
        **MASK_SIZES,
        mask_function=lambda batch, head, query, key: (key <= query) & (key // 32 == query // 32),
        local_size=32,
    )
    assert mask.dtype == torch.int32
    assert mask.flatten().tolist() == [0, 32, 64] + [LENGTH] * 62


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"is_causal": False}, "attention to later tokens (is_causal=False)"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 4, LENGTH, LENGTH)}, "position_bias"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_a_layer_may_not_ask_for(asked: dict[str, Any], message: str) -> None:
    layer = make_model("llama").model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, LENGTH, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=re.escape(f"without {message}, which LlamaAttention asks for")):
        AttentionInterface()["muse"](layer, q, k, v, None, **asked)
    if "is_causal" in asked:
        layer.is_causal = False
        with pytest.raises(ValueError, match="is_causal=False"):
            AttentionInterface()["muse"](layer, q, k, v, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("muse", {"topk": 4}, "topk is no option of MuSe attention; accepted: top_k"),
        ("muse", {"layer_idx": 4}, "layer_idx is no option"),
        ("muse", {"chunk": 100}, "chunk / query_cluster must be a power of two, got chunk=100"),
        ("sdpa", {}, "name must be an identifier that transformers has no attention for, got 'sdpa'"),
        ("eager", {}, "got 'eager'"),
        ("my_flash", {}, "got 'my_flash'"),
        ("a/b", {}, "got 'a/b'"),
    ],
)
def test_wrong_registrations_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    before = dict(AttentionInterface._global_mapping)
    with pytest.raises(ValueError, match=re.escape(message)):
        register_with_transformers(name, **options)
    assert AttentionInterface._global_mapping == before


def test_the_same_name_again_replaces_the_options() -> None:
    model = make_model("llama")
    expected = run(model, "sdpa", {})
    register_with_transformers("twice", **APPROXIMATE)
    assert relative_error(run(model, "twice", {})[0], expected[0]) > 1e-2
    register_with_transformers("twice", **(APPROXIMATE | {"exact_below": LENGTH}))
    assert_same(run(model, "twice", {}), expected)


# -------------------------------------------------------------------------------------------------------- in use


def test_a_saved_model_is_loaded_with_it(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.set_attn_implementation("muse")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="muse", dtype=torch.float64
    )
    assert loaded.config._attn_implementation == "muse"
    assert_same(run(loaded, "muse", BATCHES["left"]), run(model, "muse", BATCHES["left"]))


def compiled_layer(
    mask: str, position_ids: Tensor
) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """q, k, v of two rows, the attention of a layer, and the same as one graph."""
    model = make_model("llama")
    attend, layer = AttentionInterface()["muse"], model.model.layers[0].self_attn
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


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("batch", "is_accepted"), COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_mixes_no_documents(batch: dict[str, Any], is_accepted: bool, backend: str) -> None:
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


def test_nothing_but_torch_and_transformers_is_needed() -> None:
    blocked = ["lightning", "litdata", "jsonargparse", "tensorboard", "rich", "yaml", "triton"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); import muse_lightning.drop_in as drop_in; "
        "print(sorted({name.split('.')[1] for name in sys.modules if name.startswith('muse_lightning.')}))"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "['attention', 'drop_in', 'errors']"


def test_the_documentations_lines_train(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(lines.splitlines()) <= 10
    make_model("qwen3").float().save_pretrained(tmp_path / "model")
    for old, new in {
        '"Qwen/Qwen3-0.6B-Base"': repr(str(tmp_path / "model")),
        '"out"': f"{str(tmp_path / 'out')!r}, use_cpu=True, disable_tqdm=True, report_to=[], logging_steps=1",
        "per_device_train_batch_size=1": "per_device_train_batch_size=1, max_steps=3",
        "chunk=2048": "chunk=16, query_cluster=4, key_cluster=4, exact_below=0",
        "top_k=12": "top_k=1",
    }.items():
        assert lines.count(old) == 1, old
        lines = lines.replace(old, new)
    ids = [torch.randint(64, (LENGTH,)) for _ in range(6)]
    namespace: dict[str, Any] = {"dataset": [{"input_ids": x, "labels": x} for x in ids]}
    exec(lines, namespace)
    losses = [entry["loss"] for entry in namespace["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert torch.tensor(losses).isfinite().all()
    assert namespace["model"].config._attn_implementation == "muse"


# ----------------------------------------------------------------------------------------------------------- GPU


LONG = 8192
ON_GPU: dict[str, Any] = {"chunk": 1024, "top_k": 4}


def gpu_attention(**options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Attention by kernels, registered as "muse_gpu": the function of layers and the function of masks."""
    register_with_transformers("muse_gpu", **(ON_GPU | options), implementation="triton")
    return AttentionInterface()["muse_gpu"], AttentionMaskInterface()["muse_gpu"]


def gpu_inputs(rows: int) -> list[Tensor]:
    """q, k and v in bfloat16 as transformers makes them: views of [B, N, H, D]."""
    qkv = [torch.randn(rows, LONG, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    return [x.transpose(1, 2).requires_grad_() for x in qkv]


def gpu_model() -> PreTrainedModel:
    changes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    return make_model("llama", **changes, max_position_embeddings=LONG, initializer_range=0.05).to(
        "cuda", torch.bfloat16
    )


@pytest.mark.gpu
@pytest.mark.parametrize("text", [[(0, LONG)], [(1000, LONG), (0, 5000)]], ids=["plain", "padded"])
def test_kernels_are_called_as_the_operator_is(text: list[tuple[int, int]]) -> None:
    attend, make_mask = gpu_attention(exact_below=2048)
    place = torch.arange(LONG, device="cuda")
    is_text = torch.stack([(place >= start) & (place < end) for start, end in text])
    mask = make_mask(
        batch_size=len(text),
        q_length=LONG,
        kv_length=LONG,
        mask_function=causal_mask_function,
        attention_mask=is_text,
        device="cuda",
    )
    layer = gpu_model().model.layers[0].self_attn
    qkv = gpu_inputs(len(text))
    out, _ = attend(layer, *qkv, mask, scaling=0.125)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, qkv, dout)
    for row, (start, end) in enumerate(text):
        document = [x[row, None, :, start:end].detach().requires_grad_() for x in qkv]
        # Documents and rows take different paths to the near field, and round differently.
        expected = muse_attention(*document, **ON_GPU, exact_below=2048, implementation="triton")
        expected_gradients = torch.autograd.grad(expected, document, dout[row, None, start:end].transpose(1, 2))
        assert relative_error(out[row, start:end], expected[0].transpose(0, 1)) < 0.01
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert relative_error(gradient[row, :, start:end], expected_gradient[0]) < 0.02
        assert not out[row, ~is_text[row]].any()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", ["plain", "left", "packed"])
def test_exact_by_kernels_is_as_accurate_as_sdpa(batch: str) -> None:
    gpu_attention(exact_below=LONG)
    model, input_ids = gpu_model(), torch.randint(64, (1, LONG), device="cuda")
    place = torch.arange(LONG, device="cuda")[None]
    given: dict[str, Any] = {
        "plain": {},
        "left": {"attention_mask": (place >= 1000).long()},
        "packed": {"position_ids": torch.where(place < 3000, place, place - 3000), "use_cache": False},
    }[batch]
    is_text = given.get("attention_mask", torch.ones_like(place))[0].bool()

    def logits(model: PreTrainedModel, attention: str) -> Tensor:
        model.set_attn_implementation(attention)
        with torch.no_grad():
            return model(input_ids, **given).logits[0, is_text]

    actual, baseline = logits(model, "muse_gpu"), logits(model, "sdpa")
    # Rounding differs between the two libraries in every layer: a few times the error of one is allowed.
    assert_as_accurate(actual, exact=logits(model.double(), "sdpa"), baseline=baseline, multiple=4.0, name="logits")


@pytest.mark.gpu
def test_layers_do_not_wait_for_the_device() -> None:
    attend, make_mask = gpu_attention(exact_below=2048)
    is_text = torch.ones(2, LONG, dtype=torch.bool, device="cuda")
    is_text[0, :1000] = False
    mask = make_mask(
        batch_size=2,
        q_length=LONG,
        kv_length=LONG,
        mask_function=causal_mask_function,
        attention_mask=is_text,
        device="cuda",
    )
    layer, qkv = gpu_model().model.layers[0].self_attn, gpu_inputs(2)
    attend(layer, *qkv, mask, scaling=0.125)[0].sum().backward()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(layer, *qkv, mask, scaling=0.125)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
