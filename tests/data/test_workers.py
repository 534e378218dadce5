"""Data workers: whose signals end them, and what torch says when one dies."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from muse_lightning.data import TokenDataModule
from muse_lightning.data.workers import death_of_worker


@pytest.fixture
def data(prepared: Path) -> TokenDataModule:
    return TokenDataModule(str(prepared), seq_len=32, batch_size=2, num_workers=2)


@pytest.mark.multi_process
def test_a_preemption_of_all_processes_ends_no_worker(data: TokenDataModule) -> None:
    """torch would raise in the middle of the step that is to be saved."""
    before = set(active_children())
    iterator = iter(data.train_dataloader())
    next(iterator)
    workers = sorted(child.pid for child in set(active_children()) - before if child.pid is not None)
    assert len(workers) == 2
    subprocess.run([sys.executable, "-c", f"import os; [os.kill(pid, 15) for pid in {workers}]"], check=True)
    time.sleep(0.3)
    next(iterator)
    # Its own training process still ends it.
    os.kill(workers[0], signal.SIGTERM)
    with pytest.raises(RuntimeError, match="worker"):
        list(iterator)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_draws_nothing_from_the_generator_of_the_training(data: TokenDataModule, num_workers: int) -> None:
    """A run that resumes behind the start of an epoch or a validation would have drawn less than one that went on."""
    data.num_workers = num_workers
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_death_of_a_worker_is_found_behind_other_errors() -> None:
    error = ValueError("in the middle of a step")
    error.__context__ = RuntimeError("something else")
    error.__context__.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert death_of_worker(error) is error.__context__.__cause__
    assert death_of_worker(RuntimeError("something else")) is None
