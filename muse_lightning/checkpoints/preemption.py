"""Signals that ask a training to save: they set a flag, which is looked at when a step has ended. And what ends at once
of them, for it has nothing to save."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from muse_lightning.errors import RetryError

STOP, SAVE = signal.SIGTERM, signal.SIGUSR1
"""SIGTERM: save and stop. SIGUSR1: save and go on."""
NOTHING_SAVED = "preempted outside of training by DurableCheckpoint; nothing more was saved"
_is_ending = threading.Event()
"""Set where it is decided how a training or an evaluation ends. The SIGTERM of a launcher, which comes to every rank
when one has failed, must neither cut short what is said of it nor change the exit code."""


class SignalFlags:
    """Flags that SIGTERM and SIGUSR1 set between `install` and `restore`.

    Nothing else happens in the handlers: a save inside of one would find the training halfway through a step. Only what
    saves nothing may be ended there.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._is_ended_at_once = False
        self._before: dict[int, Any] = {}
        self._pid = 0

    def install(self, is_ended_at_once: bool = False) -> None:
        """Begin anew, in place of the handlers that there are; outside of the main thread, which gets no signals, do
        nothing.

        Args:
            is_ended_at_once: whether the first SIGTERM also raises Preempted, wherever the main thread is. Whatever
                swallows that finds the flag set.
        """
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        self.stop = self.save = False
        self._is_ended_at_once = is_ended_at_once
        for number in (STOP, SAVE):
            self._before[number] = signal.signal(number, self._set)

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def leave(self) -> None:
        """As restore, where others put back what there was before both, when the training has ended: from now on a
        signal sets a flag that nobody looks at, and ends nothing of `stoppable` either."""
        self._before = {}
        self._is_ended_at_once = False
        _is_ending.set()

    def _set(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            _die_of(number)
        elif number == STOP:
            is_first, self.stop = not self.stop, True
            if is_first and self._is_ended_at_once:
                raise Preempted
        else:
            self.save = True


class Preempted(BaseException):
    """SIGTERM. No Exception, so that no library that tries something else after one goes on as if nothing had come."""


@contextmanager
def preemption_as_retry(said: str = NOTHING_SAVED) -> Iterator[None]:
    """Let a preemption within leave as RetryError that says this."""
    try:
        yield
    except Preempted:
        raise RetryError(said) from None


@contextmanager
def stoppable(said: str = NOTHING_SAVED) -> Iterator[None]:
    """Inside, as long as nothing else handles it, SIGTERM ends what is done, as RetryError that says this: for what
    comes before the first step, and for what saves nothing. SIGUSR1 does nothing.

    Behind it both are ignored, for a program that is about to end: `cli.main` puts the handlers of before back for a
    caller that goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pid = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:
            _die_of(number)
        elif number == STOP and not _is_ending.is_set():
            raise Preempted

    _is_ending.clear()
    for number in (STOP, SAVE):
        signal.signal(number, handle)
    try:
        with preemption_as_retry(said):
            yield
    finally:
        for number in (STOP, SAVE):
            signal.signal(number, signal.SIG_IGN)


def _die_of(number: int) -> None:
    """In a forked process, such as a data worker, which inherits handlers: what the signal does by default."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Agreement:
    """Lets all ranks do what one of them has to. It goes over the network of the processors: flags on a GPU would make
    the processor wait for it in every step."""

    def __init__(self, timeout: timedelta = timedelta(hours=2)) -> None:
        is_needed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if is_needed else None

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, if it is set on any rank. Every rank must call it, as often."""
        if self._group is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(vote) for vote in votes.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values
