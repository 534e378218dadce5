"""Memory of tensors over time: which are alive, of what kind, and how much they were at most."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRANULARITY = 512
"""Bytes that PyTorch's allocator of GPU memory rounds up to."""

Temporary = Callable[[Any, tuple[Any, ...]], int]


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed; of tensors with or without content.

    Own code because `torch.distributed._tools.mem_tracker` is as private, and knows of no kernel's workspace.

    Args:
        device_type: of the tensors that count.
        temporary: bytes that an operation with these arguments takes besides its results, while it runs.

    Attributes:
        kind: Of storages made from now on.
        now: Bytes alive, by kind.
        at_peak: Bytes alive when they were most, by kind, what an operation took besides under the kind of that time.
        kind_at_peak: Of what was made then.
    """

    def __init__(self, device_type: str, temporary: Temporary = lambda *_: 0) -> None:
        super().__init__()
        self.kind = ""
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.kind_at_peak = ""
        self._device_type, self._temporary = device_type, temporary
        self._total = self._peak = 0
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}

    @property
    def peak(self) -> int:
        """Bytes alive at most."""
        return self._peak

    def add(self, kind: str, size: int) -> None:
        """Count bytes that no tensor stands for."""
        self.now[kind] += size
        self._total += size
        self._look(0)

    def label(self, kind: str, tensor: Tensor) -> None:
        """Count a tensor's storage, and as of this kind, whatever it was before."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None:
            self._remember(storage, kind)
        else:
            reference, before, size = known
            self.now[before] -= size
            self.now[kind] += size
            self._known[storage._cdata] = (reference, kind, size)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                # The device last: of a tensor without content it takes long to ask.
                if storage._cdata not in self._known and leaf.device.type == self._device_type:
                    self._remember(storage, self.kind)
        self._look(self._temporary(func, args))
        return result

    def _remember(self, storage: torch.UntypedStorage, kind: str) -> None:
        address, size = storage._cdata, -(-storage.nbytes() // GRANULARITY) * GRANULARITY
        self._known[address] = (weakref.ref(storage, lambda _: self._forget(address)), kind, size)
        self.now[kind] += size
        self._total += size

    def _forget(self, address: int) -> None:
        _, kind, size = self._known.pop(address)
        self.now[kind] -= size
        self._total -= size

    def _look(self, besides: int) -> None:
        if self._total + besides > self._peak:
            self._peak = self._total + besides
            self.at_peak, self.kind_at_peak = self.now.copy(), self.kind
            self.at_peak[self.kind] += besides
