"""Numbers of a device that the host reads a step late, so that it never waits for the step it has just started."""

from collections import deque

import torch
from torch import Tensor


class LaggedReader:
    """A queue of small tensors. On a GPU each is copied to the host as soon as it is there, and read when as many
    steps as `lag` have been started after it: by then it has long been there, and the device never runs dry.

    The lag is fixed and not "as soon as the copy has ended": ranks that act on what they read must do it in the same
    step.
    """

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    @property
    def pending(self) -> int:
        """How many have been added and not read."""
        return len(self._pending)

    def put(self, values: Tensor) -> None:
        """Add what a step has found, [n]."""
        # Into pinned memory, as a copy that does not block always is.
        host = values.to("cpu", non_blocking=values.is_cuda)
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending.append((host, event))

    def take(self, *, is_last: bool = False) -> list[float] | None:
        """What was added `lag` steps before the last one, in order; None if that is not there yet.

        Args:
            is_last: read what is left without a lag.
        """
        if len(self._pending) <= (0 if is_last else self._lag):
            return None
        host, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        found: list[float] = host.tolist()
        return found
