"""A warm server: everything is imported once, and each start of `muse` is a fork of it, one for each rank.

Starting the interpreter anew and importing takes seconds, a fork milliseconds. The server has one thread and has never
trained, so a fork is what a fresh process would be. Ranks get the environment that torchrun gives them: where Lightning
itself starts the second rank, it would run this program again.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

GRACE_S = 60.0
"""A minute is promised for what waits for a dead process."""
OTHERS_GRACE_S = 3.0
LIMIT_S = 120.0
"""A start that takes longer hangs."""

_SET_CHILD_SUBREAPER = 36
_NEWNET = 0x40000000
_SET_FLAGS, _UP = 0x8914, 1


def import_everything() -> None:
    """Import what `muse fit` imports, once."""
    import torch

    torch.set_num_threads(1)
    from muse_lightning.libraries import import_lightning

    import_lightning()
    import torch.distributed.tensor
    import torch.utils.tensorboard

    import muse_lightning.commands  # noqa: F401

    _remember_docstrings()


def _remember_docstrings() -> None:
    """The help of every option is parsed from sources at every start, half of the time until the first step. Sources do
    not change in a campaign."""
    from functools import cache

    import jsonargparse._optionals as optionals

    optionals.parse_docstring = cache(optionals.parse_docstring)


@dataclass
class Ended:
    """How one start ended."""

    codes: list[int]
    """Exit code of each rank; of one that a signal killed, minus the signal."""
    log: str
    """Standard output and error of all ranks."""
    seconds: float
    logs: list[str] = field(default_factory=list)
    """Of each rank."""
    first_code: int = 0
    """Of the first rank that failed, which a launcher reports; 0 if none did."""
    has_hung: bool = False
    stops: int = 0
    """How often a rank was stopped (SIGSTOP) and made to go on."""


@dataclass
class Start:
    """One start of a command: a process for each rank, in one process group.

    Args:
        args: the command line of `muse`.
        folder: working directory.
        ranks: number of processes.
        inside: called in each process, with its rank, before the command.
        log: file, of which there is one for each rank, `NAME.RANK`.
        grace_s: how long the other ranks have to end once one has failed.
    """

    args: Sequence[str]
    folder: Path
    ranks: int
    inside: Callable[[int], None]
    log: Path
    grace_s: float = GRACE_S
    pids: list[int] = field(default_factory=list)

    def run(self, when_stopped: Callable[[], None] = lambda: None) -> Ended:
        """Start, wait as a launcher does, and tell how it ended.

        Args:
            when_stopped: called when a rank has stopped itself, which goes on afterwards.
        """
        began = time.monotonic()
        port = _free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                self._child(rank, port)
            # In the parent too: whichever is first.
            _join_group(pid, self.pids[0] if self.pids else pid)
            self.pids.append(pid)
        ended = self._wait(began, when_stopped)
        ended.logs = [self._log_of(rank).read_text(errors="replace") for rank in range(self.ranks)]
        ended.log = "".join(ended.logs)
        ended.seconds = time.monotonic() - began
        return ended

    def _log_of(self, rank: int) -> Path:
        return self.log.with_name(f"{self.log.name}.{rank}")

    def _wait(self, began: float, when_stopped: Callable[[], None]) -> Ended:
        codes: dict[int, int] = {}
        ended = Ended([], "", 0.0)
        failed_at: float | None = None
        pause = 0.001
        while len(codes) < self.ranks:
            pid, status = 0, 0
            for candidate in self.pids:
                if candidate not in codes:
                    pid, status = os.waitpid(candidate, os.WNOHANG | os.WUNTRACED)
                    if pid:
                        break
            if pid and os.WIFSTOPPED(status):
                ended.stops += 1
                when_stopped()
                os.kill(pid, signal.SIGCONT)
            elif pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and failed_at is None:
                    ended.first_code = codes[pid]
                    failed_at = time.monotonic()
                    # As torchrun does it.
                    self._signal(signal.SIGTERM, codes)
            now = time.monotonic()
            # That of the first says how the start ended; what other ranks wait for in vain no signal interrupts.
            grace_s = self.grace_s if self.pids[0] not in codes else min(self.grace_s, OTHERS_GRACE_S)
            if now - began > LIMIT_S or (failed_at is not None and now - failed_at > grace_s):
                ended.has_hung |= self.pids[0] not in codes
                self._signal(signal.SIGKILL, codes)
            if not pid:
                time.sleep(pause)
                pause = min(0.02, pause * 1.5)
        self._reap()
        ended.codes = [codes[pid] for pid in self.pids]
        return ended

    def _reap(self) -> None:
        """End data workers of ranks that were killed, and wait until they are gone: they hold files open."""
        with suppress(ProcessLookupError, ChildProcessError):
            os.killpg(self.pids[0], signal.SIGKILL)
            while True:
                os.waitpid(-self.pids[0], 0)

    def _signal(self, number: signal.Signals, codes: dict[int, int]) -> None:
        for pid in self.pids:
            if pid not in codes:
                os.kill(pid, number)

    def _child(self, rank: int, port: int) -> None:
        code = 70
        try:
            _join_group(0, self.pids[0] if self.pids else 0)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            output = os.open(self._log_of(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.chdir(self.folder)
            self._become_rank(rank, port)
            self.inside(rank)
            from muse_lightning.cli import main

            # Not as an argument: main would take this process for one that goes on.
            sys.argv = ["muse", *self.args]
            code = int(main())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _become_rank(self, rank: int, port: int) -> None:
        from lightning.pytorch.utilities import rank_zero_only

        rank_zero_only.rank = rank
        if self.ranks > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                GROUP_RANK="0",
                WORLD_SIZE=str(self.ranks),
                LOCAL_WORLD_SIZE=str(self.ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                TORCHELASTIC_RUN_ID="campaign",
            )


def adopt_orphans() -> None:
    """Let this process be the parent of processes whose own parent dies, so that it can wait for them."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def own_loopback() -> None:
    """Give this process and its children a network of their own, where that can be had: a port that one run has found
    free is not taken by another one before its first rank listens to it."""
    if ctypes.CDLL(None).unshare(_NEWNET) == 0:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))


def _join_group(pid: int, group: int) -> None:
    # The other side was first, or it has ended.
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, group)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
