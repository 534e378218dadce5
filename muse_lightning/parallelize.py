"""What is applied to a model from outside: what is computed again in the backward pass, tiles, compilation, precision,
shards. `arrange` knows the order."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from muse_lightning.model.llama import Block, Llama
from muse_lightning.offload import Offload
from muse_lightning.tiles import in_tiles

Recompute = Literal["none", "keep_attention", "block"]
"""From the least to the most that is computed again."""

ResidualDtype = Literal["parameters", "autocast"]
"""Of the residual stream: that of the parameters, float32 in mixed precision, or that of matrix products."""

_AROUND_ATTENTION = ("before_attention", "after_attention")


def arrange(
    llama: Llama,
    *,
    recompute: Recompute = "none",
    recompute_every: int = 1,
    mlp_tiles: int = 1,
    offload: bool = False,
    compiled: bool = False,
    residual_dtype: ResidualDtype = "parameters",
    **compile_options: Any,
) -> Offload | None:
    """Apply what follows here to a model, in the order in which it works.

    Args:
        llama: changed in place; its state dict is not.
        recompute, recompute_every: of `recompute_in_backward`.
        mlp_tiles: of `tile_feed_forward`.
        offload: whether `offload_kept` is applied.
        compiled: whether `compile_around_attention` is, with `compile_options`.
        residual_dtype: "autocast" applies `residual_in_autocast`.
    Returns:
        What offloads, where something does.
    """
    has_tiles = mlp_tiles > 1
    if compiled and has_tiles:
        compile_around_attention(llama, has_tiles=True, **compile_options)
    tile_feed_forward(llama, mlp_tiles)
    recompute_in_backward(llama, recompute, recompute_every)
    if compiled and not has_tiles:
        compile_around_attention(llama, **compile_options)
    if residual_dtype == "autocast":
        residual_in_autocast(llama)
    return offload_kept(llama, recompute_every) if offload else None


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
    After `recompute_in_backward`, what "keep_attention" computes again is compiled with the backward pass, without the
    products that no gradient needs, those of q, k, v and of the feed-forward network's end.

    Args:
        llama: changed in place; its state dict is not.
        has_tiles: `tile_feed_forward` will be called, after this: the feed-forward network is compiled by itself.
        options: of torch.compile.
    """
    for block in llama.blocks:
        for name in ("before_attention", "add_attention", "feed_forward") if has_tiles else _AROUND_ATTENTION:
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
