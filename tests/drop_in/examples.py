"""Models, batches and comparisons that all tests of the drop-in share."""

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

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

MASK_SIZES: dict[str, Any] = {"batch_size": 1, "q_length": LENGTH, "kv_length": LENGTH, "device": "cpu"}

Recorder = list[SimpleNamespace]


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


def padded_documents(start: int, end: int, position_of_padding: int) -> dict[str, Any]:
    """Rows of three documents: one without padding, and one between `start` and `end`."""
    mask, positions = padding_mask((0, LENGTH), (start, end)), restarting().repeat(2, 1)
    positions[1, start:end] = restarting()[0, : end - start]
    return {"attention_mask": mask, "position_ids": positions.masked_fill(mask == 0, position_of_padding)}


def prefilled(model: PreTrainedModel, attention: str, input_ids: Tensor, cache: Any, **batch: Any) -> Tensor:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(input_ids, past_key_values=cache, **({"use_cache": True} | batch)).logits
