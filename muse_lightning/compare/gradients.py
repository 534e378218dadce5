"""How far the gradient of the loss under one attention points the way that exact attention's does."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from muse_lightning.compare.settings import Setting
from muse_lightning.data.batches import IGNORED_LABEL, Batch, to_device
from muse_lightning.model.llama import Llama
from muse_lightning.parallelize import recompute_in_backward
from muse_lightning.training.loss import total_nats

_PART = 2**24


def gradient_cosines(
    llama: Llama, batch: Batch, exact: Setting, others: Sequence[Setting], loss_chunk: int
) -> dict[str, float]:
    """Cosine of the gradient of the mean loss, over all parameters together, with that under exact attention.

    Blocks of the model are computed again in the backward pass from here on. Two gradients exist at once.

    Args:
        llama: the model, on the device that it shall run on.
        batch: on any device.
        exact: what to compare with.
    Returns:
        For each setting by name; nan where a gradient is 0.
    """
    recompute_in_backward(llama, "block")
    reference = _gradient(llama, batch, exact, loss_chunk)
    return {each.name: _cosine(_gradient(llama, batch, each, loss_chunk), reference) for each in others}


def _gradient(llama: Llama, batch: Batch, setting: Setting, loss_chunk: int) -> list[Tensor]:
    moved = to_device(batch, llama.lm_head.weight.device)
    with llama.attention_as(setting.attention), torch.enable_grad():
        hidden = llama.hidden_states(moved["input_ids"], cu_seqlens=moved.get("cu_seqlens"))
        nats = total_nats(hidden, llama.lm_head.weight, moved["labels"], chunk=loss_chunk)
        loss = nats / (moved["labels"] != IGNORED_LABEL).sum()
        return list(torch.autograd.grad(loss, list(llama.parameters())))


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    dot, norm_a, norm_b = (_dot(left, right) for left, right in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(norm_a * norm_b) if norm_a and norm_b else math.nan


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Sum of products in float64, a part of a tensor at a time: an embedding is large."""
    return sum(
        torch.dot(x.double(), y.double()).item()
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left.flatten().split(_PART), right.flatten().split(_PART), strict=True)
    )
