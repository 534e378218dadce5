"""Where in a forward and backward pass the first number appears that is not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Located:
    """What `locating` found, in the order in which it was computed: the first of each alone.

    Attributes:
        forward: the module whose output it is; of nested ones the innermost, for that ends first.
        backward: the module at whose output the gradient is not finite.
        before_backward: the one at whose output it was the last time that it was finite: what lies between has done it.
    """

    def __init__(self) -> None:
        self.forward: str | None = None
        self.backward: str | None = None
        self.before_backward: str | None = None
        self._hooked: set[tuple[int, int]] = set()

    def _output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if self.forward is None and not _is_finite(tensor):
                self.forward = name
            # What a module and a module inside it both return is the inner one's.
            place = id(tensor.grad_fn), tensor.output_nr
            if tensor.requires_grad and place not in self._hooked:
                self._hooked.add(place)
                tensor.register_hook(partial(self._gradient, name))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        if self.backward is not None:
            return
        if _is_finite(gradient):
            self.before_backward = name
        else:
            self.backward = name


@contextmanager
def locating(model: nn.Module) -> Iterator[Located]:
    """Look at every output of every module inside, and at its gradient. Waits for the device each time; not for
    modules that are compiled."""
    located = Located()
    handles = [
        module.register_forward_hook(partial(located._output, name)) for name, module in model.named_modules() if name
    ]
    try:
        yield located
    finally:
        for handle in handles:
            handle.remove()


def not_finite(tensors: Iterator[tuple[str, Tensor | None]]) -> list[str]:
    """Names of tensors that hold a number that is not finite."""
    return [name for name, tensor in tensors if tensor is not None and not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    # Apart from the graph: what is computed again in the backward pass must save as many tensors as the first time.
    return bool(torch.isfinite(tensor.detach()).all())
