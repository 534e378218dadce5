"""What is applied to a model from outside: what is computed again in the backward pass, compilation, precision."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from muse_lightning.model.llama import Llama

Recompute = Literal["none", "keep_attention", "block"]
"""From the least to the most that is computed again."""

ResidualDtype = Literal["parameters", "autocast"]
"""Of the residual stream: that of the parameters, float32 in mixed precision, or that of matrix products."""

_AROUND_ATTENTION = ("before_attention", "after_attention")


def recompute_in_backward(llama: Llama, policy: Recompute) -> None:
    """Trade time for memory: keep less of the forward pass and compute it again in the backward pass.

    Args:
        llama: changed in place; its state dict is not.
        policy: "none" keeps every activation; "keep_attention" keeps the input of each block and what goes into and
            comes out of attention, so that all but attention is computed again, for about a quarter more work; "block"
            keeps the input alone, for about a third more work.
    """
    for block in llama.blocks:
        for name in {"none": (), "keep_attention": _AROUND_ATTENTION, "block": ("forward",)}[policy]:
            setattr(block, name, partial(checkpoint, getattr(block, name), use_reentrant=False))


def compile_around_attention(llama: Llama, **options: Any) -> None:
    """Compile what lies before and after attention in each block: what is between matrix products becomes few kernels.

    One compilation serves all blocks, any number of documents, and every strategy, for attention is not part of it. To
    be called after `recompute_in_backward`: what "keep_attention" computes again is then compiled with the backward
    pass, without the products that no gradient needs, those of q, k, v and of the feed-forward network's end.

    Args:
        llama: changed in place; its state dict is not.
        options: of torch.compile.
    """
    for block in llama.blocks:
        for name in _AROUND_ATTENTION:
            setattr(block, name, torch.compile(getattr(block, name), fullgraph=True, dynamic=False, **options))


def residual_in_autocast(llama: Llama) -> None:
    """Under autocast, keep the residual stream in its dtype: half the bytes between matrix products, and of what
    `recompute_in_backward` keeps. Norms still compute in float32, but what a block adds is rounded. Without autocast
    nothing changes.

    Args:
        llama: changed in place; its state dict is not.
    """
    llama.model.embed_tokens.register_forward_hook(_to_autocast)


def _to_autocast(_: nn.Module, __: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
    device_type = embedded.device.type
    if not torch.is_autocast_enabled(device_type):
        return embedded
    return embedded.to(torch.get_autocast_dtype(device_type))


def shard_parameters(llama: Llama, mesh: DeviceMesh) -> None:
    """Give each device of a mesh its part of every parameter, and with it of gradients and optimizer state (FSDP2).

    A block's parameters are gathered when it runs, forward and backward, in their own dtype, so that numbers are those
    of plain data parallelism; embedding, last norm and head are gathered for the whole step. To be called last, while
    the model is on the meta device.

    Args:
        llama: changed in place. Its state dict is of DTensors under the same names.
        mesh: of one dimension.
    Source: PyTorch FSDP (arXiv 2304.11277).
    """
    for block in llama.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(llama, mesh=mesh, reshard_after_forward=False)
    # What the loss calls instead of `forward`; it then reads the head's weights, which are still gathered.
    register_fsdp_forward_method(llama, "hidden_states")
