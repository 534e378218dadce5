"""Attention of transformers by kernels."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from muse_kernels import muse_attention
from muse_lightning.drop_in import register_with_transformers
from tests.assertions import assert_as_accurate, relative_error
from tests.drop_in.examples import make_model

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
@pytest.mark.parametrize(
    ("text", "cut"),
    [([(0, LONG)], None), ([(1000, LONG), (0, 5000)], None), ([(1000, LONG), (0, 5000)], 3500)],
    ids=["plain", "padded", "packed-and-padded"],
)
def test_kernels_are_called_as_the_operator_is(text: list[tuple[int, int]], cut: int | None) -> None:
    """Where `cut` is given, positions start again there."""
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
    position_ids = None if cut is None else torch.where(place < cut, place, place - cut)[None]
    out, _ = attend(layer, *qkv, mask, scaling=0.125, position_ids=position_ids)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, qkv, dout)
    assert not out[~is_text].any()
    ends = [sorted({start, end, cut or start}) for start, end in text]
    for row, start, end in [(row, *span) for row, places in enumerate(ends) for span in itertools.pairwise(places)]:
        document = [x[row, None, :, start:end].detach().requires_grad_() for x in qkv]
        # Documents and rows take different paths to the near field, and round differently.
        expected = muse_attention(*document, **ON_GPU, exact_below=2048, implementation="triton")
        expected_gradients = torch.autograd.grad(expected, document, dout[row, None, start:end].transpose(1, 2))
        assert relative_error(out[row, start:end], expected[0].transpose(0, 1)) < 0.01
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert relative_error(gradient[row, :, start:end], expected_gradient[0]) < 0.02


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


@pytest.mark.gpu
def test_a_compiled_layer_refuses_documents_of_positions_alone() -> None:
    attend, _ = gpu_attention(exact_below=2048)
    layer, qkv, place = gpu_model().model.layers[0].self_attn, gpu_inputs(1), torch.arange(LONG, device="cuda")[None]

    @torch.compile(fullgraph=True)
    def compiled(position_ids: Tensor) -> Tensor:
        return attend(layer, *qkv, None, scaling=0.125, position_ids=position_ids)[0] * 2

    with torch.no_grad():
        expected = attend(layer, *qkv, None, scaling=0.125)[0] * 2
        assert relative_error(compiled(place), expected) < 0.01
        with pytest.raises(ValueError, match="accepts position_ids that start again only with use_cache=False"):
            compiled(torch.where(place < 3000, place, place - 3000))
