"""Inside of a forked process: what it does is noted, and faults strike at the instants that they are planted at.

Instants are counted in progress, not in seconds, so that a seed repeats them: the n-th batch or validation batch of
this start, the n-th file operation of its m-th save, a stage of starting up.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.campaign.digest import digest, state_digests

STAGES = ("parse", "locked", "loaded", "train_start")
"""Of starting up: nothing is read; the lock is in hand; the checkpoint is read; training begins."""

WRITES = 64
"""To a file, of which one is an instant."""


@dataclass(frozen=True)
class Instant:
    """When a fault strikes.

    `point` is "batch", "validation", "save" or one of STAGES; `count` is which of them in this start, from 1; of a
    save, `operation` is which of its file operations, from 0, or its end if it has fewer.
    """

    point: str
    count: int = 1
    operation: int = 0

    def __str__(self) -> str:
        if self.point in STAGES:
            return self.point
        return f"{self.point} {self.count}" + (f" operation {self.operation}" if self.point == "save" else "")


Strike = Callable[["Probe"], None]


class Probe:
    """Notes progress and lets faults strike. One for each process.

    Args:
        events: file that notes go to, a JSON line each, in one write that a kill does not cut.
        rank: of the process.
        strikes: what is done, and when.
    """

    def __init__(self, events: Path, rank: int, strikes: list[tuple[Instant, Strike]]) -> None:
        self.rank = rank
        self._descriptor = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._strikes = strikes
        self._counts: dict[str, int] = {}
        self._operation = 0
        self._saver: int | None = None
        self.operation_error: OSError | None = None
        """Raised by every further operation of this save."""

    def note(self, event: str, **fields: Any) -> None:
        """Write down that something happened."""
        line = json.dumps({"event": event, "time": time.monotonic(), **fields}) + "\n"
        os.write(self._descriptor, line.encode())

    def reach(self, point: str) -> None:
        """Count a point, and strike if it is time."""
        self._counts[point] = self._counts.get(point, 0) + 1
        self._strike(Instant(point, self._counts[point]))

    def _strike(self, now: Instant) -> None:
        for planted in [entry for entry in self._strikes if entry[0] == now]:
            self._strikes.remove(planted)
            self.note("struck", instant=str(now))
            planted[1](self)

    # Saves

    def save_begins(self) -> None:
        """The thread that calls this is the one whose file operations count."""
        self._counts["save"] = self._counts.get("save", 0) + 1
        self._operation = 0
        self._saver = threading.get_ident()

    def save_ends(self) -> None:
        """What was planted at a later operation than there was strikes now."""
        self._saver = None
        self.operation_error = None
        for instant, _ in list(self._strikes):
            if instant.point == "save" and instant.count == self._counts["save"]:
                self._strike(instant)

    def operate(self, act: Callable[[], Any], is_counted: bool = True) -> Any:
        """One file operation of a save; what is not counted is no instant, but may fail."""
        if threading.get_ident() != self._saver:
            return act()
        if is_counted:
            self._strike(Instant("save", self._counts["save"], self._operation))
            self._operation += 1
        if self.operation_error is not None:
            raise self.operation_error
        return act()


class _CountedFile:
    """A file of which one in WRITES is an operation, the first included. A checkpoint has hundreds: if each counted,
    a random one would nearly always be of them, and never what comes behind."""

    def __init__(self, file: Any, probe: Probe) -> None:
        self._file = file
        self._probe = probe
        self._writes = 0

    def write(self, data: Any) -> int:
        self._writes += 1
        return int(self._probe.operate(lambda: self._file.write(data), is_counted=self._writes % WRITES == 1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_CountedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def attach(probe: Probe) -> None:
    """Put the probe into the code of this process."""
    _attach_to_stages(probe)
    _attach_to_training(probe)
    _attach_to_saves(probe)


def _after(owner: Any, name: str, then: Callable[..., None]) -> None:
    before = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        result = before(*args, **kwargs)
        then(*args, **kwargs)
        return result

    setattr(owner, name, both)


def _before(owner: Any, name: str, first: Callable[..., None]) -> None:
    after = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        first(*args, **kwargs)
        return after(*args, **kwargs)

    setattr(owner, name, both)


def _attach_to_stages(probe: Probe) -> None:
    from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
    from muse_lightning.recipe_cli import MuseCLI
    from muse_lightning.training.run_folder import RunFolder

    _before(MuseCLI, "parse_arguments", lambda *_: probe.reach("parse"))
    _before(MuseCLI, "_report_differences", lambda *_: probe.reach("locked"))
    _after(DurableCheckpointIO, "load_checkpoint", lambda *_, **__: probe.reach("loaded"))
    _after(RunFolder, "__init__", lambda folder, *_, **__: probe.note("folder", resumed=_step(folder.resumed)))


def _step(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.stem.removeprefix("step="))


def _attach_to_training(probe: Probe) -> None:
    from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint

    def begins(_: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        probe.note("begin", batch=trainer.datamodule.batches_read - 1, state=state_digests(trainer, module))

    def ends(_: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _draw()
        tokens = json.loads("{" + batch["record"] + "}")["hash"]
        loss = float(outputs["loss"]).hex()
        number = trainer.datamodule.batches_read - 1
        probe.note("end", batch=number, step=trainer.global_step, tokens=tokens, loss=loss)
        probe.reach("batch")

    def finishes(_: Any, trainer: Any, module: Any) -> None:
        if trainer.max_steps == trainer.global_step:
            probe.note("final", state=state_digests(trainer, module))

    _before(DurableCheckpoint, "on_train_start", lambda *_: probe.reach("train_start"))
    # After it has restored the random states.
    _after(DurableCheckpoint, "on_train_batch_start", begins)
    # Before it saves, and after the ledger.
    _before(DurableCheckpoint, "on_train_batch_end", ends)
    _before(DurableCheckpoint, "on_validation_batch_end", lambda *_, **__: probe.reach("validation"))
    _after(DurableCheckpoint, "on_train_end", finishes)


def _draw() -> None:
    """Draw from every generator after each batch, as dropout would: else no state of them would ever matter."""
    import random

    import numpy as np
    import torch

    digest([random.random(), float(np.random.rand()), torch.rand(2), random.gauss(0, 1), float(np.random.randn())])


def _attach_to_saves(probe: Probe) -> None:
    import muse_lightning.files as files
    from muse_lightning.checkpoints.durable_io import DurableCheckpointIO

    real = {"open": open, "fsync": os.fsync, "replace": os.replace, "unlink": Path.unlink}
    save = DurableCheckpointIO._save

    def opened(path: Any, mode: str = "r", **options: Any) -> Any:
        if "x" not in mode:
            return real["open"](path, mode, **options)
        return _CountedFile(probe.operate(lambda: real["open"](path, mode, **options)), probe)

    def saved(*args: Any, **options: Any) -> None:
        probe.save_begins()
        try:
            save(*args, **options)
        finally:
            probe.save_ends()

    vars(files)["open"] = opened
    vars(os)["fsync"] = lambda descriptor: probe.operate(lambda: real["fsync"](descriptor))
    vars(os)["replace"] = lambda source, target: probe.operate(lambda: real["replace"](source, target))
    setattr(Path, "unlink", lambda path, missing_ok=False: probe.operate(lambda: real["unlink"](path, missing_ok)))  # noqa: B010
    setattr(DurableCheckpointIO, "_save", saved)  # noqa: B010
