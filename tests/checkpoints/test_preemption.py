"""Signals set flags, in the process that asked for it alone; ranks agree on what any of them was told."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muse_lightning import cli
from muse_lightning.checkpoints.preemption import Agreement, SignalFlags, stoppable
from muse_lightning.errors import RetryError

ROOT = Path(__file__).parents[2]


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Whatever a test does, handlers are those from before afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_flags() -> None:
    flags = SignalFlags()
    flags.install()
    flags.install()
    assert (flags.stop, flags.save) == (False, False)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (flags.stop, flags.save) == (False, True)
    os.kill(os.getpid(), signal.SIGTERM)
    assert (flags.stop, flags.save) == (True, True)
    flags.restore()
    flags.stop = False
    flags.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert flags.stop
    before = [signal.getsignal(number) for number in SIGNALS]
    flags.restore()
    assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2


def test_another_thread_leaves_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    flags = SignalFlags()
    thread = threading.Thread(target=flags.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_library_that_catches_every_exception_does_not_lose_it() -> None:
    """As jsonargparse, which tries something else when a parameter cannot be resolved."""

    def parse() -> None:
        with stoppable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Exception:
                raise ValueError('Unable to add parameter "sources"') from None

    with pytest.raises(RetryError, match="preempted outside of training"):
        parse()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("kind", ["flags", "stoppable"])
def test_a_forked_process_dies_of_the_signal(number: signal.Signals, kind: str) -> None:
    """A data worker that could not be terminated would be waited for."""
    flags = SignalFlags()
    guard = stoppable()
    flags.install() if kind == "flags" else guard.__enter__()
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    flags.restore() if kind == "flags" else guard.__exit__(None, None, None)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == number


def preempted_in(act: Callable[[], object]) -> bool:
    """Whether SIGTERM in the middle of it leaves as RetryError."""
    try:
        with stoppable():
            act()
            os.kill(os.getpid(), signal.SIGTERM)
    except RetryError:
        return True
    return False


def test_a_training_that_has_its_ending_keeps_it() -> None:
    """The launcher's SIGTERM, as another rank has failed, comes while an error is on its way out, or is being told."""
    assert preempted_in(lambda: None)
    assert not preempted_in(SignalFlags().leave)
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    assert preempted_in(lambda: None), "of the next training in this process"


@pytest.mark.parametrize("is_program", [True, False])
def test_a_command_tells_its_ending_to_the_end(monkeypatch: pytest.MonkeyPatch, is_program: bool) -> None:
    def run(args: list[str]) -> int:
        with stoppable():
            raise ValueError("closed by peer")

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(cli, "_print_traceback", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(None if is_program else []) == 1
    after = signal.SIG_IGN if is_program else signal.SIG_DFL
    assert [signal.getsignal(number) for number in SIGNALS] == [after] * 2


def test_before_the_first_step() -> None:
    with pytest.raises(RetryError, match="preempted outside of training"), stoppable():
        os.kill(os.getpid(), signal.SIGUSR1), os.kill(os.getpid(), signal.SIGTERM)


def test_alone_one_agrees_with_oneself() -> None:
    assert Agreement().any(True, False) == [True, False]
    assert Agreement().gather({"a": 1}) == [{"a": 1}]


PROGRAM = """
import sys, torch.distributed as dist
from muse_lightning import cli
from muse_lightning.checkpoints.preemption import Agreement
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
agreement = Agreement()
print(agreement.any(rank == 0, rank == 1, False), agreement.gather(rank))
"""


@pytest.mark.multi_process
def test_two_processes_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["[True, True, False] [0, 1]\n"] * 2
