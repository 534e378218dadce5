"""What tokens see: padding, packed documents by positions and boundaries, both at once, and chunks."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from muse_lightning.attention import Muse
from tests.assertions import relative_error
from tests.drop_in.examples import (
    BATCHES,
    DOCUMENTS,
    LENGTH,
    MASK_SIZES,
    SIZES,
    Recorder,
    assert_same,
    make_model,
    padded_documents,
    padding_mask,
    prefilled,
    restarting,
    run,
)


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


@pytest.mark.parametrize("has_mask", [False, True])
def test_there_is_no_mask_where_nothing_is_hidden(has_mask: bool, recorder: Recorder) -> None:
    """A row without documents takes the faster kernels, and stays exact for longer."""
    model, cache = make_model("llama"), DynamicCache()
    for start, end in ((0, 60), (60, 61)):
        batch = {"attention_mask": torch.ones(1, end, dtype=torch.long)} if has_mask else {}
        prefilled(model, "muse", torch.randint(64, (1, end - start)), cache, **batch)
    assert [call.mask for call in recorder] == [None] * 4


def test_chunked_attention_is_attention_within_documents() -> None:
    """As in Llama 4: a token sees the tokens of its own chunk."""
    mask = AttentionMaskInterface()["muse"](
        **MASK_SIZES,
        mask_function=lambda batch, head, query, key: (key <= query) & (key // 32 == query // 32),
        local_size=32,
    )
    assert mask.dtype == torch.int32
    assert mask.flatten().tolist() == [0, 32, 64] + [LENGTH] * 62
