"""What is applied to a model from outside: so far, what is computed again in the backward pass."""

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import checkpoint

from muse_lightning.model.llama import Llama

Recompute = Literal["none", "block"]


def recompute_in_backward(llama: Llama, policy: Recompute) -> None:
    """Trade time for memory: keep less of the forward pass and compute it again in the backward pass.

    Args:
        llama: changed in place; its state dict is not.
        policy: "none" keeps every activation; "block" keeps the input of each block, for about a third more work.
    """
    if policy == "none":
        return
    for block in llama.blocks:
        forward: Any = partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = forward  # type: ignore[method-assign]
