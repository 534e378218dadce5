"""Next-token loss, in chunks of tokens, so that the logits of all tokens never exist at once.

Own code because PyTorch 2.11, which we support, lacks `torch.nn.functional.linear_cross_entropy`.

Letters: M tokens, V vocabulary, E hidden size.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from muse_lightning.data.batches import IGNORED_LABEL


@torch.no_grad()
def next_token_nats(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, *, chunk: int, compiled: bool = False
) -> Tensor:
    """Negative log-likelihood of each label, without gradients (`total_nats` has them).

    Logits exist for `chunk` tokens at a time, [chunk, V]. The matrix product runs in the precision of autocast if it is
    on, the softmax in float32 at least.

    Args:
        hidden: [..., E], floating point.
        head_weight: [V, E].
        labels: int64 [...]; -100 is no label.
        chunk: tokens whose logits exist at once. Larger is faster until the device is full; memory is about
            chunk * V * 10 bytes in mixed precision, compiled 2.
        compiled: compile what follows the matrix product with torch.compile: on a GPU into one kernel, or two where
            gradients are made.
    Returns:
        [...] nats, float32 (float64 for float64 inputs); 0 where there is no label.
    Raises:
        ValueError: chunk is not positive, or shapes do not fit.
    """
    _check(hidden, head_weight, labels, chunk)
    hidden, weight, flat = _operands(hidden, head_weight, labels)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(len(flat), chunk):
            logits = F.linear(hidden[rows].to(weight.dtype), weight)
            parts.append((_compiled_nats() if compiled else _nats)(logits, flat[rows], with_softmax=False))
    return torch.cat(parts).view(labels.shape)


def total_nats(hidden: Tensor, head_weight: Tensor, labels: Tensor, *, chunk: int, compiled: bool = False) -> Tensor:
    """Sum of `next_token_nats`, differentiable in hidden states and head.

    Where gradients are enabled they are made with the logits, in the forward pass, and multiplied with the gradient of
    the sum in the backward pass: a chunk's logits are computed once. It can be gone through backward once.

    Args:
        hidden, head_weight, labels, chunk, compiled: as for `next_token_nats`.
    Returns:
        [] nats, float32 (float64 for float64 inputs).
    Raises:
        ValueError: chunk is not positive, or shapes do not fit.
    Source: Liger kernels (arXiv 2410.10989), fused linear cross entropy.
    """
    if not torch.is_grad_enabled():
        return next_token_nats(hidden, head_weight, labels, chunk=chunk, compiled=compiled).sum()
    _check(hidden, head_weight, labels, chunk)
    return _TotalNats.apply(hidden, head_weight, labels, chunk, compiled)


class _TotalNats(torch.autograd.Function):
    """Saves the gradients, for a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk: int, compiled: bool) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        shape = hidden.shape
        hidden, weight, labels = _operands(hidden, head_weight, labels)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in the precision of the parameter, not in that of the products.
        grad_weight = torch.zeros_like(head_weight) if needs_weight else None
        total = torch.zeros((), dtype=_at_least_float32(weight.dtype), device=weight.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(labels), chunk):
                states = hidden[rows].to(weight.dtype)
                nats, grad_logits = _nats_and_gradient(F.linear(states, weight), labels[rows], compiled)
                total += nats.sum()
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits @ weight
                if grad_weight is not None:
                    _add_product(grad_weight, grad_logits.mT, states)
                del grad_logits  # before the next ones are made
        ctx.save_for_backward(None if grad_hidden is None else grad_hidden.view(shape), grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the head's is a gibibyte. A second backward pass is refused by autograd, which sees the change.
        grads = (grad if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)


def _nats(logits: Tensor, labels: Tensor, *, with_softmax: bool) -> Tensor:
    """Nats of each label, [M]. `with_softmax` puts softmax in place of the logits [M, V], and 0 where is no label."""
    is_label = labels != IGNORED_LABEL
    x = logits.to(_at_least_float32(logits.dtype))
    picked = x.gather(-1, labels.clamp(min=0)[:, None])
    # Not logsumexp: torch.compile finds maximum and sum of these four operations in one pass.
    largest = x.amax(-1, keepdim=True)
    exponentials = (x - largest).exp_()
    total = exponentials.sum(-1, keepdim=True)
    if with_softmax:
        logits.copy_(exponentials.mul_(is_label[:, None] / total))
    return torch.where(is_label, (total.log() + largest - picked)[:, 0], 0.0)


@cache
def _compiled_nats() -> Callable[..., Tensor]:
    return torch.compile(_nats)


def _nats_and_gradient(logits: Tensor, labels: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
    """Nats of each label, [M], and the gradient of their sum, which takes the place of the logits [M, V]."""
    nats = (_compiled_nats() if compiled else _nats)(logits, labels, with_softmax=True)
    # softmax - 1 where the label is, not from a softmax that was rounded. Apart from what is compiled: it would copy.
    return nats, logits.scatter_(-1, labels.clamp(min=0)[:, None], torch.expm1(-nats).to(logits.dtype)[:, None])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; where the device can, without rounding the product to the dtype of its factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _check(hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != head_weight.shape[1]:
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, head_weight {tuple(head_weight.shape)}, "
            f"labels {tuple(labels.shape)}"
        )


def _operands(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [M, E], the head in the dtype of the products, labels [M]."""
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    return hidden.flatten(0, -2), head_weight.to(dtype), labels.flatten()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, length)) for start in range(0, length, chunk))
