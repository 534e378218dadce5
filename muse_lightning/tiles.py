"""A function of single tokens run over pieces of them, so that what lies inside it exists for one piece at a time.

Own code because `torch.utils.checkpoint` for each piece, in a block that is computed again as a whole, would compute
all pieces but one a third time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_tiles(function: Callable[[Tensor], Tensor], tiles: int, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """`function(x)`, a piece of the tokens at a time, forward and backward; only x is kept for the backward pass, which
    computes each piece again.

    Args:
        function: maps [M, E] to [M, E] of the same dtype, each row by itself.
        tiles: how many pieces, of equal size but for the last.
        parameters: what `function` uses and may have gradients, which are summed over pieces in their own precision.
        x: [..., E].
    Returns:
        [..., E], contiguous.
    """
    rows = x.flatten(0, -2)
    if not torch.is_grad_enabled():
        return _run(function, tiles, rows, x.shape)
    # Before anything is computed: if all that a surrounding checkpoint wants is x, it stops here.
    kept = _Keep.apply(rows, torch.empty(0, device=x.device, requires_grad=True))
    return _InTiles.apply(function, tiles, [kept], x.shape, rows, *parameters)


def _run(function: Callable[[Tensor], Tensor], tiles: int, rows: Tensor, shape: torch.Size) -> Tensor:
    # In its final shape: FSDP2 warns of a block that returns a view.
    out = rows.new_empty(shape)
    for piece, result in zip(rows.chunk(tiles), out.view(rows.shape).chunk(tiles), strict=True):
        result.copy_(function(piece))
    return out


class _Keep(torch.autograd.Function):
    """Keeps a tensor as autograd does, under whatever hooks for saved tensors are set."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise AssertionError("nothing depends on what is returned")


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor], Tensor],
        tiles: int,
        kept: list[Tensor],
        shape: torch.Size,
        rows: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.function, ctx.tiles, ctx.kept, ctx.parameters = function, tiles, kept, parameters
        ctx.autocast = _autocast_of(rows.device.type)
        return _run(function, tiles, rows, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        # The tensor, for it holds on to its node, of which torch 2.11 frees all that it keeps with the last tensor.
        (kept,) = ctx.kept
        (rows,) = kept.grad_fn.saved_tensors
        ctx.kept = kept = None
        needs_rows, *needs = ctx.needs_input_grad[4:]
        wanted = [parameter for parameter, is_needed in zip(ctx.parameters, needs, strict=True) if is_needed]
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_out = grad_out.flatten(0, -2)
        sums: list[Tensor] = []
        with torch.enable_grad(), ctx.autocast():
            for index, piece in enumerate(rows.chunk(ctx.tiles)):
                piece = piece.detach().requires_grad_()
                out = ctx.function(piece)
                grad_piece, *grads = torch.autograd.grad(out, [piece, *wanted], grad_out.chunk(ctx.tiles)[index])
                if grad_rows is not None:
                    grad_rows.chunk(ctx.tiles)[index].copy_(grad_piece)
                if not sums:
                    sums = grads
                else:
                    torch._foreach_add_(sums, grads)
                # Or they would live while the next piece's come into being.
                del out, grad_piece, grads
        found = iter(sums)
        return None, None, None, None, grad_rows, *(next(found) if is_needed else None for is_needed in needs)


def _autocast_of(device_type: str) -> Callable[[], AbstractContextManager[object]]:
    """Makes a context in which autocast is as it is now: the backward pass runs outside the one of the forward pass."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
