"""Filling a parameter, whether or not it is sharded."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def assign(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy values into a parameter.

    Args:
        parameter: filled in place. Where it is sharded, all processes must call this, and each gets its part of what
            the first one gives.
        whole: values of the parameter's whole shape, of any dtype and on any device.
    """
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(whole)
