"""What blocks keep for the backward pass, in the host's memory: it leaves the device while the next block computes, and
comes back while the block behind it does.

Own code because `torch.autograd.graph.save_on_cpu` copies each tensor while the device waits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MIN_BYTES = 2**20
"""Smaller tensors stay: a copy of their own costs more than they take."""


class Transfers:
    """Copies between a device and the host; from and to a GPU on a stream of their own, by pinned memory, which
    PyTorch's allocator of it uses again in the next step."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def to_host(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy, and what is to be waited for before x may be overwritten."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return host, self._copy(host, x)

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy, and what is to be waited for before it may be read."""
        x = torch.empty(host.shape, dtype=host.dtype, device=device)
        return x, self._copy(x, host)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        on_gpu = target if target.is_cuda else source
        if not on_gpu.is_cuda:
            target.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(on_gpu.device)
        # What is read must have been computed, and what is written may be memory that queued kernels still use.
        self._stream.wait_stream(torch.cuda.current_stream(on_gpu.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()


@dataclass
class _Storage:
    """A storage, on the device, the host or both. Its memory on the device is freed only behind a wait for the copy:
    `record_stream` would do, but keeps it until the host has seen the copy's end, and the host is far ahead."""

    device: torch.device
    x: Tensor | None
    host: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> None:
        """Let what the device computes from now on come after the copy."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)
            self.done = None

    def leave(self) -> None:
        """Free it on the device."""
        self.wait()
        self.x = None

    def __del__(self) -> None:
        self.wait()  # should a graph be dropped before its backward pass


@dataclass(frozen=True)
class _Handle:
    """What stands for a tensor in autograd's graph."""

    block: "_Block"
    key: tuple[int, torch.dtype]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Block:
    """What one block keeps."""

    def __init__(self, offload: "Offload", previous: "_Block | None", shared: tuple[Any, ...]) -> None:
        self.offload, self.previous = offload, previous
        self.shared = {tensor.untyped_storage()._cdata for tensor in shared if isinstance(tensor, Tensor)}
        self.storages: dict[tuple[int, torch.dtype], _Storage] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Handle:
        storage = tensor.untyped_storage()
        is_whole = tensor.nbytes == storage.nbytes() and storage.nbytes() >= MIN_BYTES
        if not is_whole or isinstance(tensor, nn.Parameter) or storage._cdata in self.shared:
            return tensor
        key = (storage._cdata, tensor.dtype)
        if key not in self.storages:
            x = tensor.detach().as_strided((tensor.numel(),), (1,), 0)
            self.storages[key] = _Storage(tensor.device, x, *self.offload.transfers.to_host(x))
        return _Handle(self, key, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, kept: Tensor | _Handle) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.load()
        if self.previous is not None:
            self.previous.load()
            self.previous = None
        self.offload.forget(self)
        storage = self.storages[kept.key]
        storage.wait()
        assert storage.x is not None
        return storage.x.as_strided(kept.shape, kept.stride, kept.offset)

    def load(self) -> None:
        """Bring back what is not on the device."""
        for storage in self.storages.values():
            if storage.x is None:
                storage.x, storage.done = self.offload.transfers.to_device(storage.host, storage.device)

    def leave(self) -> None:
        """Free everything on the device."""
        for storage in self.storages.values():
            storage.leave()


class Offload:
    """Runs the blocks of a model, and keeps on the host what the backward pass needs of all but the last.

    Attributes:
        transfers: How tensors get there and back.
    """

    def __init__(self) -> None:
        self.transfers = Transfers()
        self._last: _Block | None = None

    def run(self, function: Callable[..., Tensor], is_first: bool, x: Tensor, *shared: Any) -> Tensor:
        """`function(x, *shared)`; tensors of at least 1 MiB that autograd keeps of it go to the host.

        Args:
            function: a block.
            is_first: of those that are run by this.
            shared: what all blocks are given, which stays.
        """
        if not torch.is_grad_enabled():
            return function(x, *shared)
        block = _Block(self, None if is_first else self._last, shared)
        with torch.autograd.graph.saved_tensors_hooks(block.pack, block.unpack):
            out = function(x, *shared)
        # A block later than it could, so that the copy has all of this block's time.
        if block.previous is not None:
            block.previous.leave()
        self._last = block
        return out

    def forget(self, block: _Block) -> None:
        """The forward pass is over: the next one has nothing to do with this block."""
        if self._last is block:
            self._last = None
