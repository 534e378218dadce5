"""The gradient of an optimizer step as a whole."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(module: nn.Module) -> Tensor:
    """2-norm of all gradients of a module, float [] on their device: nothing waits for it. Of shards, that of the
    whole; then every rank must call it."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
