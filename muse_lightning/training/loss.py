"""Next-token loss, in chunks of tokens, so that the logits of all tokens never exist at once.

Own code because PyTorch 2.11, which we support, lacks `torch.nn.functional.linear_cross_entropy`.

Letters: M tokens, V vocabulary, E hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from muse_lightning.data.batches import IGNORED_LABEL


def next_token_nats(hidden: Tensor, head_weight: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
    """Negative log-likelihood of each label, differentiable in hidden states and head.

    Logits exist for `chunk` tokens at a time, [chunk, V], in the forward pass and again, recomputed, in the backward
    pass. The matrix products run in the precision of autocast if it is on, the softmax in float32 at least.

    Args:
        hidden: [..., E], floating point.
        head_weight: [V, E].
        labels: int64 [...]; -100 is no label.
        chunk: tokens whose logits exist at once. Larger is faster until the device is full; memory is about
            chunk * V * 8 bytes.
    Returns:
        [...] nats, float32 (float64 for float64 inputs); 0 where there is no label.
    Raises:
        ValueError: chunk is not positive, or shapes do not fit.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != head_weight.shape[1]:
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, head_weight {tuple(head_weight.shape)}, "
            f"labels {tuple(labels.shape)}"
        )
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    nats = _ChunkedNats.apply(hidden.flatten(0, -2), head_weight, labels.flatten(), chunk, dtype)
    return nats.view(labels.shape)


class _ChunkedNats(torch.autograd.Function):
    """Saves the normaliser of each token and nothing of size V per token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        parts, normalisers = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head_weight.to(dtype)
            for rows in _chunks(len(labels), chunk):
                logits = _logits(hidden[rows], weight)  # [chunk, V]
                normalisers.append(logits.logsumexp(-1))
                picked = logits.gather(-1, labels[rows].clamp(min=0)[:, None])[:, 0]
                parts.append(torch.where(labels[rows] == IGNORED_LABEL, 0.0, normalisers[-1] - picked))
        ctx.save_for_backward(hidden, head_weight, labels, torch.cat(normalisers))
        ctx.chunk, ctx.dtype = chunk, dtype
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head_weight, labels, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in the precision of the parameter, not in that of the products.
        grad_weight = torch.zeros_like(head_weight) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head_weight.to(ctx.dtype)
            for rows in _chunks(len(labels), ctx.chunk):
                is_label = labels[rows] != IGNORED_LABEL
                grad_logits = _logits(hidden[rows], weight).sub_(normaliser[rows, None]).exp_()  # softmax, [chunk, V]
                target = labels[rows].clamp(min=0)[:, None]
                grad_logits.scatter_add_(-1, target, -torch.ones_like(target, dtype=grad_logits.dtype))
                grad_logits *= (grad_nats[rows] * is_label)[:, None]
                grad_logits = grad_logits.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad_logits @ weight).to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad_logits.mT @ hidden[rows].to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(hidden.to(weight.dtype), weight)
    return logits if logits.dtype == torch.float64 else logits.float()
