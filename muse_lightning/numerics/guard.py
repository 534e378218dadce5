"""Steps without a finite loss and gradient are skipped and counted; a run of nothing else is stopped."""

import sys
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.checkpoints.preemption import Agreement
from muse_lightning.errors import NumericsError, UserError, reason_of
from muse_lightning.numerics.failed_step import KEY, FailedStep, replay_path
from muse_lightning.numerics.lagged import LaggedReader
from muse_lightning.numerics.skipping import skip_where
from muse_lightning.numerics.step_inputs import MicroBatch, StepInputs
from muse_lightning.numerics.verify import check_verifiable, recompute
from muse_lightning.training.gradients import gradient_norm
from muse_lightning.training.log_step import ends_step, is_log_step
from muse_lightning.training.module import LanguageModel

FOLDER_NAME = "numerics"
_LAG = 1
"""Steps after which the host reads what a step has found."""


class NumericsGuard(L.Callback):
    """Skips each optimizer step whose loss or gradient norm is not finite, and stops a run that has nothing else.

    Any rank decides for all. A step that is skipped changes no parameter and no state of the optimizer, its count of
    steps included. What the host counts goes on: position in the data, `global_step`, learning rate, `train/tokens`.
    All is decided on the device; the host reads it a step later, so a run stops a step late, which is skipped too
    whatever its numbers. With `precision: 16-mixed` gradients that overflow are the loss scaler's, and count here only
    where the scale has come down to 1.

    Args:
        stop_after: skipped steps in a row at which the run ends with exit code 76, and the first of them is saved, with
            weights and optimizer as it found them, for `muse fit --replay`.
        verify_every: optimizer steps between two of which forward and backward are computed twice and the gradients
            compared bit for bit; a difference ends the run likewise. Such a step takes twice as long and the memory of
            one more gradient. Null: none. On a GPU with trainer.deterministic alone.
        dirpath: where they are saved; null: `numerics` in the folder of the run.
    Raises:
        UserError: a value out of range.

    Example:
        >>> trainer = L.Trainer(callbacks=[NumericsGuard(stop_after=10)])
    """

    def __init__(self, stop_after: int = 5, verify_every: int | None = None, dirpath: Path | None = None) -> None:
        super().__init__()
        for name, value in (("stop_after", stop_after), ("verify_every", verify_every)):
            if value is not None and value < 1:
                raise UserError(f"NumericsGuard: {name} is {value}; accepted: at least 1")
        self.stop_after = stop_after
        self.verify_every = verify_every
        self.dirpath = dirpath
        self.settings = ""
        """The run's configuration, as YAML: for the file that is replayed."""
        self._agreement = Agreement()
        self._folder = Path()
        self._reader = LaggedReader(_LAG)
        self._steps: deque[StepInputs] = deque(maxlen=_LAG + 1)
        self._is_step_over = True
        self._has_stepped = False
        self._loss: Tensor | None = None
        # Skipped steps: in a row, and in all.
        self._row: Tensor | int = 0
        self._total: Tensor | int = 0
        self._first_of_row: FailedStep | None = None
        self._differs: FailedStep | None = None
        self._to_save: dict[str, Any] | None = None

    # Set-up

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder.

        Raises:
            UserError: this run's steps cannot be verified.
        """
        if stage != TrainerFn.FITTING:
            return
        if self.verify_every is not None:
            check_verifiable(trainer)
        run_folder = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(trainer.strategy.broadcast(str(self.dirpath or Path(run_folder) / FOLDER_NAME)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count, or go on."""
        self._agreement = Agreement()
        # Of a training before this one, which may have ended anywhere.
        self._reader = LaggedReader(_LAG)
        self._steps.clear()
        self._is_step_over, self._has_stepped, self._loss = True, False, None
        self._first_of_row = self._differs = None
        device = trainer.strategy.root_device
        row, total = int(self._row), int(self._total)
        # What goes on behind a row at which a run has ended begins another.
        row = row if row < self.stop_after else 0
        self._row, self._total = (torch.tensor(float(count), device=device) for count in (row, total))

    def state_dict(self) -> dict[str, int]:
        """The counters, for a checkpoint."""
        return {"consecutive_skipped_steps": int(self._row), "skipped_steps": int(self._total)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take the counters of a checkpoint."""
        self._row, self._total = state_dict["consecutive_skipped_steps"], state_dict["skipped_steps"]

    # A step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the step will be computed from."""
        if self._is_step_over:
            self._steps.append(StepInputs(trainer.global_step + 1))
            self._is_step_over = False
        self._steps[-1].micro_batches.append(MicroBatch(batch, batch_idx))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add the micro-batch's loss to that of the step."""
        scale = _loss_scale(trainer)
        loss = loss.detach() if scale is None else loss.detach() / scale
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Judge the step, before gradients are clipped."""
        assert self._loss is not None
        norm = gradient_norm(pl_module)
        is_bad, loss = self._judge(trainer, self._loss, norm)
        self._loss = None
        # The first step of a process may sum over ranks in another order than all later ones.
        inputs = self._steps[-1]
        if isinstance(pl_module, LanguageModel):
            inputs.exact_heads = pl_module.chosen_heads
            inputs.attends_exactly = pl_module.attends_exactly
        if self.verify_every is not None and inputs.step % self.verify_every == 0 and self._has_stepped:
            ranks = self._agreement.gather(recompute(trainer, pl_module, inputs))
            if any(ranks):
                names = sorted({name for rank in ranks for name in rank})
                self._differs = FailedStep(inputs, float(loss), float(norm), differs=names)
                is_bad = torch.ones_like(is_bad)
        self._has_stepped = True
        # Nor is the one taken that begins before the host knows that the run ends: weights stay as the row found them.
        is_bad = (is_bad + (self._row >= self.stop_after)).clamp(max=1)
        self._row = (self._row + 1) * is_bad
        self._total = self._total + is_bad
        skip_where(optimizer, is_bad)
        self._reader.put(torch.stack([self._row, self._total, loss, norm.float()]))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the counters, and read what the step before has found.

        Raises:
            NumericsError: too many steps in a row were skipped, or one was not the same twice.
        """
        if not ends_step(trainer):
            return
        self._is_step_over = True
        if is_log_step(trainer, trainer.global_step):
            pl_module.log("train/skipped_steps", self._total)
            pl_module.log("train/consecutive_skipped_steps", self._row)
        if self._differs is not None:
            self._stop(trainer, self._differs, _different(self._differs))
        self._read(trainer, self._reader.take())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what the last steps have found.

        Raises:
            NumericsError: too many steps in a row were skipped.
        """
        while (found := self._reader.take(is_last=True)) is not None:
            self._read(trainer, found)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the step that is to be replayed."""
        if self._to_save is not None:
            checkpoint[KEY] = self._to_save

    # What was found

    def _judge(self, trainer: L.Trainer, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step is skipped, float32 [] of 0 or 1, and its loss over all ranks, which agree on both."""
        scale = _loss_scale(trainer)
        overflows = ~norm.isfinite() if scale is None else ~norm.isfinite() & (scale <= 1)
        found = torch.stack([(~loss.isfinite() | overflows).float(), loss.float()])
        if trainer.world_size > 1:
            # Not strategy.reduce, which has a barrier before it.
            dist.all_reduce(found)
        return (found[0] > 0).float(), found[1] / trainer.world_size

    def _read(self, trainer: L.Trainer, found: list[float] | None) -> None:
        if found is None:
            return
        row, total, loss, norm = found
        if row == 0:
            self._first_of_row = None
            return
        step = trainer.global_step - self._reader.pending
        inputs = next(inputs for inputs in self._steps if inputs.step == step)
        if self._first_of_row is None:
            self._first_of_row = FailedStep(inputs, loss, norm, row=int(row))
        if trainer.is_global_zero:
            print(
                f"numerics: step {step} skipped: loss {loss:g}, gradient norm {norm:g}; {row:.0f} in a row, of "
                f"{self.stop_after} at most, {total:.0f} in all",
                file=sys.stderr,
                flush=True,
            )
        if row >= self.stop_after:
            self._stop(trainer, self._first_of_row, f"{row:.0f} steps in a row had no finite loss and gradient")

    def _stop(self, trainer: L.Trainer, failed: FailedStep, said: str) -> None:
        step = failed.inputs.step
        path = replay_path(self._folder, step)
        ranks = self._agreement.gather([micro.on_host() for micro in failed.inputs.micro_batches])
        self._to_save = failed.as_saved(ranks, trainer.accumulate_grad_batches, self.settings)
        problem = None
        try:
            trainer.save_checkpoint(path, weights_only=False)
            io = trainer.strategy.checkpoint_io
            if isinstance(io, DurableCheckpointIO):
                io.wait()
                problem = io.failure
        except OSError as error:
            problem = error
        finally:
            self._to_save = None
        if problem is not None:
            raise NumericsError(f"{said}; the step could not be saved: {reason_of(problem)}")
        raise NumericsError(f"{said}; step {step} is saved: muse fit --replay {path}")


def _loss_scale(trainer: L.Trainer) -> Tensor | None:
    """What 16-mixed multiplies the loss with, on the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # `get_scale` waits for the device.
    return None if scaler is None else scaler._scale


def _different(failed: FailedStep) -> str:
    names = failed.differs
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"step {failed.inputs.step} computed twice has other bits in the gradient of {names[0]}{more}"
