"""What is applied to a model from outside: what is computed again in the backward pass, tiles, and compilation.

In this order: `compile_around_attention`, `tile_feed_forward`, `recompute_in_backward`, `offload_kept`.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from muse_lightning.model.llama import Block, Llama
from muse_lightning.offload import Offload
from muse_lightning.tiles import in_tiles

Recompute = Literal["none", "keep_attention", "block"]
"""From the least to the most that is computed again."""

_AROUND_ATTENTION = ("before_attention", "after_attention")


def recompute_in_backward(llama: Llama, policy: Recompute, every: int = 1) -> None:
    """Trade time for memory: keep less of the forward pass and compute it again in the backward pass.

    Args:
        llama: changed in place; its state dict is not.
        policy: "none" keeps every activation; "keep_attention" keeps the input of each block and what goes into and
            comes out of attention, so that all but attention is computed again, for about a quarter more work; "block"
            keeps the input alone, for about a third more work.
        every: the policy is that of one block in so many, from the first on; the others keep every activation. From the
            first on, for the last blocks are gone when the first are computed again.
    """
    for block in llama.blocks[::every]:
        for name in {"none": (), "keep_attention": _AROUND_ATTENTION, "block": ("forward",)}[policy]:
            setattr(block, name, partial(checkpoint, getattr(block, name), use_reentrant=False))


def offload_kept(llama: Llama, every: int = 1) -> Offload:
    """Keep on the host what blocks that are computed again keep: their inputs; with "keep_attention", what goes into
    and comes out of attention.

    Args:
        llama: changed in place; its state dict is not.
        every: as given to `recompute_in_backward`.
    """
    offload = Offload()
    for index, block in enumerate(llama.blocks[::every]):
        block.forward = partial(offload.run, block.forward, index == 0)  # type: ignore[method-assign]
    return offload


def tile_feed_forward(llama: Llama, tiles: int) -> None:
    """Run the feed-forward network over pieces of the tokens, forward and backward: what lies inside it, several times
    intermediate_size numbers a token, exists for one piece at a time and is not kept.

    Args:
        llama: changed in place; its state dict is not.
        tiles: how many pieces; 1 changes nothing. The network is computed again in the backward pass, once, whatever
            else is.
    """
    if tiles > 1:
        for block in llama.blocks:
            block.feed_forward = partial(_feed_forward_in_tiles, block, block.feed_forward, tiles)  # type: ignore[method-assign]


def _feed_forward_in_tiles(block: Block, feed_forward: Any, tiles: int, x: Tensor) -> Tensor:
    # Looked up now: leaving the meta device makes new parameters.
    parameters = [*block.post_attention_layernorm.parameters(), *block.mlp.parameters()]
    return in_tiles(feed_forward, tiles, parameters, x)


def compile_around_attention(llama: Llama, *, has_tiles: bool = False, **options: Any) -> None:
    """Compile what lies before and after attention in each block: what is between matrix products becomes few kernels.

    One compilation serves all blocks, any number of documents, and every strategy, for attention is not part of it.

    Args:
        llama: changed in place; its state dict is not.
        has_tiles: `tile_feed_forward` will be called: the feed-forward network is compiled by itself.
        options: of torch.compile.
    """
    for block in llama.blocks:
        for name in ("before_attention", "add_attention", "feed_forward") if has_tiles else _AROUND_ATTENTION:
            setattr(block, name, torch.compile(getattr(block, name), fullgraph=True, dynamic=False, **options))
