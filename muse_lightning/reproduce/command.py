"""`muse reproduce`: trains a run again, in a new version of its name, and compares the losses."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muse_lightning.callbacks.stop_after import StopAfter
from muse_lightning.checkpoints.preemption import stoppable
from muse_lightning.commands import run_in_folder
from muse_lightning.errors import ExitCode, NumericsError, UserError
from muse_lightning.function_commands import parse_flags
from muse_lightning.pretrained.run_folder import CONFIG_FILE
from muse_lightning.recipe_cli import MuseCLI, say
from muse_lightning.reproduce.losses import TRAIN_LOSS, Losses, compare, first_other_batch, logged_losses
from muse_lightning.reproduce.recorded import Start, differences_then_now, starts_of

SWITCH = "--ignore_differences"


@dataclass(frozen=True)
class Request:
    """What is to be reproduced.

    Args:
        run: Folder of a run.
        steps: Optimizer steps to train at most, from where the run started; null: as many as it has logged.
        tolerance: Largest difference of a loss, in nats, that counts as equal; 0 is bit for bit.
        ignore_differences: Go on where code, packages, data, device or configuration are others than they were.
    """

    run: Path
    steps: int | None = None
    tolerance: float = 0.0
    ignore_differences: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps: {self.steps} found, at least 1 expected")
        if not 0 <= self.tolerance < math.inf:
            raise UserError(f"tolerance: {self.tolerance} found, a number of at least 0 expected")


def reproduce(verb: str, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """`muse reproduce RUN`. Exits with `ExitCode.DIFFERENT` if the losses do not agree.

    Raises:
        UserError: it is no run with losses, something differs from when it ran, or a mistake in the flags.
        RetryError, StorageError: as of a fit.
    """
    args = [f"{arg}=true" if arg == SWITCH else arg for arg in args]
    request = Request(**parse_flags(Request, ("run",), verb, description, args, allowed))
    run = request.run.absolute()
    starts, then = starts_of(run), logged_losses(run)
    stop = _last_step(request, starts, then)
    given = [
        f"--config={run / CONFIG_FILE}",
        f"--run.root={run.parent.parent}",
        f"--run.name={run.parent.name}",
        # The data as it is: preparing it again would replace what the run has read, and others may read.
        "--data.sources=null",
        # Other gradients end a run; here they are found by its losses.
        "--verify_every=null",
        # They could forbid to stop.
        "--trainer.min_steps=null",
        "--trainer.min_epochs=null",
        # This machine may be slower.
        "--trainer.max_time=null",
    ]
    _check_same(MuseCLI(verb, description, given, allowed, builds="data"), starts, request, stop)
    with stoppable():
        cli = MuseCLI("fit", description, given, allowed, builds="trainer", reproduces=run)
        cli.trainer.callbacks.append(StopAfter(stop))  # type: ignore[attr-defined]
        try:
            run_in_folder("fit", cli)
        except NumericsError as error:
            # As the run may have ended, too: its losses say so.
            say(f"reproduce: {error}")
    if not cli.trainer.is_global_zero:
        return
    agreements = compare(then, logged_losses(cli.run_folder.path), stop)
    for agreement in agreements:
        print(agreement)
    if max(agreement.largest for agreement in agreements) > request.tolerance:
        _say_why(cli, run)
        raise SystemExit(ExitCode.DIFFERENT)


def _last_step(request: Request, starts: list[Start], then: dict[str, Losses]) -> int:
    """The optimizer step to end at: that of the last loss that was logged, or as many as were asked for.

    Raises:
        UserError: nothing was logged before it.
    """
    first, first_logged = starts[0].step, min(then[TRAIN_LOSS])
    stop = max(step for losses in then.values() for step in losses) + 1
    if request.steps is not None:
        stop = min(stop, first + request.steps)
    if first_logged >= stop:
        raise UserError(
            f"steps: {request.steps} found, but the first {TRAIN_LOSS} of {request.run} is of its step "
            f"{first_logged + 1 - first}; give at least that"
        )
    return stop


def _check_same(cli: MuseCLI, starts: list[Start], request: Request, stop: int) -> None:
    """Say what differs from when the run ran.

    Raises:
        UserError: something does, and that is not to be ignored.
    """
    found = differences_then_now(starts, cli.environment() | {"data": cli.datamodule.identity()}, stop)
    for line in found:
        say(f"reproduce: {line}")
    if found and not request.ignore_differences:
        raise UserError(
            f"{request.run}: {len(found)} difference{'s' * (len(found) > 1)} from when it ran; restore what was, or "
            f"give {SWITCH}"
        )


def _say_why(cli: MuseCLI, run: Path) -> None:
    batch = first_other_batch(run, cli.run_folder.path)
    if batch is None:
        print("batches: equal")
    else:
        print(f"batches: first difference at batch {batch}")
    if cli.trainer.strategy.root_device.type == "cuda" and not cli.config.trainer.deterministic:
        print(
            "reproduce: on a GPU bits are the same only of runs with trainer.deterministic=true; --tolerance=1e-3 "
            "accepts others",
            file=sys.stderr,
        )
