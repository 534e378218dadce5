"""What has no place in MuSe attention, and registrations: errors in one line."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from muse_lightning.drop_in import register_with_transformers
from tests.assertions import relative_error
from tests.drop_in.examples import APPROXIMATE, LENGTH, MASK_SIZES, assert_same, make_model, padding_mask, run


def test_boundaries_between_padding_are_refused() -> None:
    model = make_model("llama")
    model.set_attn_implementation("muse")
    batch = {"attention_mask": padding_mask((0, 60)), "cu_seq_lens_q": torch.tensor([0, 30, 70])}
    with pytest.raises(ValueError, match="cu_seq_lens_q without padding, got both"):
        model(torch.randint(64, (1, LENGTH)), **batch)


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
        ("muse", {"topk": 4}, "topk is no option of MuSe attention; nearest: top_k"),
        ("muse", {"exact_layer": (0,)}, "exact_layer is no option of MuSe attention; nearest: exact_layers"),
        *(
            ("muse", {"exact_layers": layers}, f"exact_layers must be numbers of layers, such as (0, -1), got {layers}")
            for layers in (0, None, (0.5,), [0, True], ("0",))
        ),
        *(
            (
                "muse",
                {"exact_heads": heads},
                f"exact_heads must be key-value heads by the number of a layer, such as {{4: [0, 1]}}, got {heads}",
            )
            for heads in (1, [0], {0: 1}, {0: [0.5]}, {"0": [1]}, {True: [1]})
        ),
        ("muse", {"exact_head": {0: [0]}}, "exact_head is no option of MuSe attention; nearest: exact_heads"),
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


def test_exact_layers_that_a_model_does_not_have() -> None:
    register_with_transformers("muse_deep", **APPROXIMATE, exact_layers=(0, 2))
    model = make_model("llama")
    model.set_attn_implementation("muse_deep")
    line = r'attn_implementation="muse_deep": exact_layers names layer 2; accepted: 0 to 1, or from the end -1 to -2'
    with pytest.raises(ValueError, match=line):
        model(torch.randint(64, (1, LENGTH)))


@pytest.mark.parametrize(
    ("heads", "line"),
    [
        ({2: [0]}, "exact_heads names layer 2; accepted: 0 to 1, or from the end -1 to -2"),
        ({1: [2]}, "exact_heads names key-value head 2 of layer 1; accepted: 0 to 1"),
        ({-1: [-1]}, "exact_heads names key-value head -1 of layer 1; accepted: 0 to 1"),
    ],
)
def test_exact_heads_that_a_model_does_not_have(heads: dict[int, list[int]], line: str) -> None:
    register_with_transformers("muse_deep", **APPROXIMATE, exact_heads=heads)
    model = make_model("llama")
    model.set_attn_implementation("muse_deep")
    with pytest.raises(ValueError, match=re.escape(f'attn_implementation="muse_deep": {line}')):
        model(torch.randint(64, (1, LENGTH)))


@pytest.mark.parametrize("options", [{"exact_layers": (0,)}, {"exact_heads": {0: [1]}}])
def test_exact_layers_of_a_module_that_has_no_number(options: dict[str, Any]) -> None:
    register_with_transformers("muse_deep", **APPROXIMATE, **options)
    layer = make_model("llama").model.layers[0].self_attn
    del layer.layer_idx
    q, k, v = (torch.randn(1, heads, LENGTH, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=r"LlamaAttention does not say which layer it is; accepted: no exact_layers"):
        AttentionInterface()["muse_deep"](layer, q, k, v, None)


def test_the_same_name_again_replaces_the_options() -> None:
    model = make_model("llama")
    expected = run(model, "sdpa", {})
    register_with_transformers("twice", **APPROXIMATE)
    assert relative_error(run(model, "twice", {})[0], expected[0]) > 1e-2
    register_with_transformers("twice", **(APPROXIMATE | {"exact_below": LENGTH}))
    assert_same(run(model, "twice", {}), expected)
