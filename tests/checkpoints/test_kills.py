"""A save that is killed before or after each of its steps: what was there before, or the new one, is whole."""

import builtins
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_lightning.checkpoints.choice import last_checkpoint
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.checkpoints.manifest import problem_of
from muse_lightning.checkpoints.retention import Retention, remove_partial
from tests.checkpoints.folder import steps

STEPS = ("open", "write", "fsync", "replace", "unlink")
MOST = 60
"""More steps than a save has; how many it has is asserted."""


def content(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"weight": torch.full((50, 100), float(step))}}


def save(folder: Path, step: int, retention: Retention) -> None:
    """One save, with the retention after it, as a training does it."""

    def then() -> None:
        retention.add(step)
        retention.apply(folder)

    DurableCheckpointIO(is_asynchronous=False).save_checkpoint(
        content(step), folder / f"step={step}.ckpt", {"then": then}
    )


class KilledFile:
    """A file of which each write is a step."""

    def __init__(self, file: Any, step: Callable[..., Any]) -> None:
        self._file = file
        self._step = step

    def write(self, data: Any) -> int:
        def half() -> int:
            self._file.write(memoryview(data)[: len(data) // 2])
            self._file.flush()
            return 0

        return int(self._step(lambda: self._file.write(data), half))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "KilledFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def killed_at(number: int, moment: str, folder: Path, count_file: Path) -> int:
    """Fork, save step 3, and die at one of its steps: before it, after it, or, of a write, in its middle. The exit
    status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    torch.set_num_threads(1)
    done = 0

    def step(act: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        nonlocal done
        done += 1
        if done != number:
            return act()
        {"before": lambda: None, "middle": half, "after": act}[moment]()
        return os.kill(os.getpid(), signal.SIGKILL)

    real = {"open": builtins.open, "fsync": os.fsync, "replace": os.replace, "unlink": Path.unlink}
    builtins.open = lambda path, mode="r", **o: (
        KilledFile(step(lambda: real["open"](path, mode, **o)), step) if "x" in mode else real["open"](path, mode, **o)
    )
    os.fsync = lambda descriptor: step(lambda: real["fsync"](descriptor))
    os.replace = lambda source, target: step(lambda: real["replace"](source, target))
    Path.unlink = lambda path, missing_ok=False: step(lambda: real["unlink"](path, missing_ok))
    retention = Retention(2, keep_best=True)
    retention.add(1)
    retention.add(2)
    save(folder, 3, retention)
    count_file.write_text(str(done))
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "middle", "after"])
def test_at_every_step_of_a_save(tmp_path: Path, moment: str) -> None:
    kills = 0
    for number in range(1, MOST):
        folder = tmp_path / f"{number}" / "checkpoints"
        retention = Retention(2, keep_best=True)
        for before in (1, 2):
            save(folder, before, retention)
        status = killed_at(number, moment, folder, tmp_path / "count")
        found = last_checkpoint(folder, say=lambda line: None)
        assert found in (folder / "step=2.ckpt", folder / "step=3.ckpt")
        # Two that are whole, at every instant.
        assert sum(problem_of(path) is None for path in folder.glob("*.ckpt")) >= 2
        loaded = DurableCheckpointIO().load_checkpoint(found)
        assert torch.equal(loaded["state_dict"]["weight"], content(loaded["global_step"])["state_dict"]["weight"])
        # And what goes on from there saves as ever.
        remove_partial(folder)
        resumed = Retention(2, keep_best=True, resumed=loaded["global_step"])
        for later in (3, 4, 5):
            save(folder, later, resumed)
        assert steps(folder) == [4, 5]
        assert not list(folder.glob(".*"))
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        kills += 1
    # Opening, 10 or more writes, and the rest, of both files; the removal of the oldest.
    assert kills == int((tmp_path / "count").read_text())
    assert kills >= 20
