"""A checkpoint copied to host memory, so that training may go on while it is written."""

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


class HostCopy:
    """Host memory for one checkpoint at a time, kept from save to save; pinned where tensors come from a GPU.

    It grows to the size of all distinct tensors, and is never there twice.
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)
        self._is_for_gpu = False

    def take(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """A copy that shares nothing with the original. It is valid until the next call.

        Args:
            checkpoint: nested dictionaries, lists and tuples of tensors on any device, and plain values. Tensors that
                are one in it are one in the copy.
        """
        tensors = {_identity(tensor): tensor for tensor in _tensors(checkpoint)}
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        self.reserve(*self.needed(checkpoint))
        copies: dict[tuple[Any, ...], Tensor] = {}
        offset = 0
        for identity, tensor in tensors.items():
            copies[identity] = self._view(offset, tensor)
            copies[identity].copy_(tensor, non_blocking=True)
            offset += _room(tensor)
        for device in devices:
            torch.cuda.synchronize(device)
        return _replaced(checkpoint, copies)

    def reserve(self, size: int, is_pinned: bool) -> None:
        """Get memory for so many bytes, if there is less.

        The system gives pages when they are first written, which for the first copy would take longer than the copy.
        """
        if size <= len(self._buffer) and is_pinned == self._is_for_gpu:
            return
        self.free()
        self._buffer = np.empty(size, dtype=np.uint8)
        self._buffer.fill(0)
        self._is_for_gpu = is_pinned
        if is_pinned:
            # Not pin_memory: its allocator rounds up to a power of two.
            runtime = torch.cuda.cudart()
            address = self._buffer.ctypes.data
            # Where the system refuses, as by a limit on locked memory, the copy is slower.
            if int(runtime.cudaHostRegister(address, size, 0)) == 0:
                weakref.finalize(self._buffer, runtime.cudaHostUnregister, address)

    @staticmethod
    def needed(state: Any) -> tuple[int, bool]:
        """Bytes that a copy of a state takes, and whether they should be pinned."""
        tensors = {_identity(tensor): tensor for tensor in _tensors(state)}
        return sum(map(_room, tensors.values())), any(tensor.is_cuda for tensor in tensors.values())

    def free(self) -> None:
        """Give the memory back."""
        self._buffer = np.empty(0, dtype=np.uint8)
        self._is_for_gpu = False

    def _view(self, offset: int, like: Tensor) -> Tensor:
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        # A storage of its own for each, or the file would hold the whole buffer once for every dtype.
        flat = torch.frombuffer(self._buffer, dtype=like.dtype, count=like.numel(), offset=offset)
        return flat.view(like.shape)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _room(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _replaced(value: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copies[_identity(value.detach())]
    if isinstance(value, dict):
        same = type(value)() if type(value) is not dict else {}
        same.update({copy.deepcopy(key): _replaced(item, copies) for key, item in value.items()})
        return same
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, copies) for item in value)
    return copy.deepcopy(value)
