"""When a training saves, and when it stops because it was asked to."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn

from muse_lightning.checkpoints.choice import has_manifest, report, step_path
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.checkpoints.manifest import Manifest
from muse_lightning.checkpoints.preemption import Agreement, SignalFlags
from muse_lightning.checkpoints.random_state import random_state, restore_random_state
from muse_lightning.checkpoints.retention import FEWEST, Retention, remove_partial
from muse_lightning.errors import RetryError, StorageError, UserError, reason_of


class DurableCheckpoint(Checkpoint):
    """Saves `checkpoints/step=N.ckpt` with its manifest, at intervals, before validations, on signals, at the end.

    SIGTERM stops the training with exit code 75 once it is saved; after SIGUSR1 it goes on. Always between two
    optimizer steps, on all ranks alike; the first writes. There is no `last.ckpt`: which is the newest or the best
    follows from the manifests. Lightning's ModelCheckpoint is no base of it: that removes and links files by rules of
    its own, and each of its hooks would have to be overridden.

    Args:
        dirpath: where they go, a folder for this run alone; None: `checkpoints` in the folder of the run.
        every_n_steps: optimizer steps between two saves; None: no matter how many.
        every_n_minutes: minutes between two saves; None: no matter how many. More often loses less of a run that is
            killed; a save that is due waits until the one before has been written.
        keep_last: how many of the newest stay, at least 2.
        keep_best: whether the one with the lowest val/loss stays too.
        is_asynchronous: write while the training goes on. Takes as much host memory as a checkpoint has.
    Raises:
        UserError: a value out of range.

    Example:
        >>> trainer = L.Trainer(callbacks=[DurableCheckpoint(every_n_minutes=10.0, keep_last=3)])  # doctest: +SKIP
    """

    def __init__(
        self,
        dirpath: Path | None = None,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 30.0,
        keep_last: int = 2,
        keep_best: bool = True,
        is_asynchronous: bool = True,
    ) -> None:
        super().__init__()
        for name, value, is_accepted, accepted in (
            ("every_n_steps", every_n_steps, every_n_steps is None or every_n_steps >= 1, "at least 1, or null"),
            ("every_n_minutes", every_n_minutes, every_n_minutes is None or every_n_minutes > 0, "above 0, or null"),
            ("keep_last", keep_last, keep_last >= FEWEST, f"at least {FEWEST}"),
        ):
            if not is_accepted:
                raise UserError(f"DurableCheckpoint: {name} is {value}; accepted: {accepted}")
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.is_asynchronous = is_asynchronous
        self._io = DurableCheckpointIO(is_asynchronous)
        self._signals = SignalFlags()
        self._agreement = Agreement()
        self._folder = Path()
        self._retention = Retention(keep_last, keep_best)
        self._random_states: list[dict[str, Any]] | None = None
        # Steps: the last one that ended, the last one given to the writer, the last one that is on the disk.
        self._step = 0
        self._submitted: int | None = None
        self._durable: int | None = None
        self._is_between_steps = False
        self._is_due = False
        self._saved_at = 0.0
        self._has_stopped = False
        self._is_flush_due = False
        self._is_prepared = False

    # Set-up

    @staticmethod
    def check_strategy(strategy: Strategy) -> None:
        """Refuse a strategy of which no one file can hold what it has.

        Raises:
            UserError: names the strategy.
        """
        gathers = isinstance(strategy, ModelParallelStrategy) and not strategy._save_distributed_checkpoint
        if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not gathers:
            raise UserError(
                f"trainer.strategy: {type(strategy).__name__} saves in shards, DurableCheckpoint in one file; "
                "accepted: auto, ddp, sharded, or another Checkpoint among trainer.callbacks"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, and let the trainer save by our own CheckpointIO.

        Raises:
            UserError: as `check_strategy`.
        """
        if stage != TrainerFn.FITTING:
            return
        self.check_strategy(trainer.strategy)
        # On every rank, for it waits for all.
        run_folder = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(trainer.strategy.broadcast(str(self.dirpath or Path(run_folder) / "checkpoints")))
        found = trainer.strategy.checkpoint_io
        if isinstance(found, DurableCheckpointIO):
            self._io = found
            found.is_asynchronous = self.is_asynchronous
        else:
            trainer.strategy.checkpoint_io = self._io

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to listen and to count.

        Raises:
            UserError: ranks have resumed from different checkpoints, or the folder is another run's.
        """
        self._agreement = Agreement()
        self._step = trainer.global_step
        steps = self._agreement.gather(self._step)
        if len(set(steps)) > 1:
            raise UserError(f"ckpt_path: ranks resumed from steps {steps}; all must see the same files")
        resumed = None
        if trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parent == self._folder.resolve():
            resumed = self._submitted = self._durable = self._step
        # Retention would remove them, as if this run had left them behind.
        is_new_here = trainer.is_global_zero and self._durable is None and not _is_trial(trainer)
        (has_others,) = self._agreement.any(is_new_here and has_manifest(self._folder))
        if has_others:
            raise UserError(
                f"DurableCheckpoint: dirpath {self._folder} has checkpoints of another run; accepted: a new folder, or "
                "one of them as ckpt_path"
            )
        self._retention = Retention(self.keep_last, self.keep_best, resumed)
        if trainer.is_global_zero:
            remove_partial(self._folder)
        self._saved_at = time.monotonic()
        self._has_stopped = False
        # Here, because Lightning has just set handlers of its own, which save or broadcast inside of the handler.
        self._signals.install()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states of the random generators for the first batch."""
        self._random_states = checkpoint.get("random_states")

    # Saving

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop if that was asked for in the step before, whose figures have been logged by now."""
        self._between_steps(trainer)
        if self._random_states is not None:
            # Now, because what reads batches draws random numbers when it starts.
            if len(self._random_states) == trainer.world_size:
                restore_random_state(self._random_states[trainer.global_rank])
            self._random_states = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where an optimizer step has ended, save if it is time to, or if a signal has asked for it on any rank."""
        self._is_between_steps = trainer.global_step != self._step
        if not self._is_between_steps or _is_trial(trainer):
            return
        self._step = trainer.global_step
        is_due = trainer.is_global_zero and self._must_save()
        stop, asked, is_due = self._agreement.any(self._signals.stop, self._signals.save, is_due)
        if asked:
            self._signals.save = False
        if stop or asked or is_due or self._step == trainer.max_steps:
            self._save(trainer)
        elif not self._is_prepared and trainer.is_global_zero:
            # Only now has the optimizer its moments.
            self._io.prepare([pl_module.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]])
            self._is_prepared = True
        if asked and trainer.is_global_zero:
            report(f"checkpoint: SIGUSR1 at step {self._step}: saving {self._path}")
        if stop:
            self._finish(trainer)
            self._has_stopped = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save before each validation: if it is long, what was trained is not at risk meanwhile."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not _is_trial(trainer):
            self._between_steps(trainer)
            if self._is_between_steps and self._submitted != self._step:
                self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop in the middle of a validation if that is asked for: the step before it is saved."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self._submitted != self._step:
            return
        (stop,) = self._agreement.any(self._signals.stop)
        if stop:
            self._finish(trainer)
            self._has_stopped = True
            self._between_steps(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add to the manifest what was measured."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self._submitted == self._step and metrics:
            path = self._path
            self._io.submit(lambda: self._measured(path, metrics))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save where the training ended, and wait until that is on the disk.

        Raises:
            StorageError: it cannot be saved.
        """
        if trainer.global_step > 0 and not _is_trial(trainer):
            self._step = trainer.global_step
            self._finish(trainer)
        # Lightning puts back, before `teardown`, what there was before its handlers and ours. Its own must not have the
        # time between: the second SIGTERM of a launcher would broadcast to ranks that have ended.
        self._signals.leave()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of the random generators of all ranks."""
        checkpoint["random_states"] = self._agreement.gather(random_state())

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no longer. What is being written is finished when the trainer takes its CheckpointIO down."""
        self._signals.leave()

    @property
    def _path(self) -> Path:
        return step_path(self._folder, self._step)

    def _must_save(self) -> bool:
        """Whether one of the intervals has passed and nothing is being written. Asked on the first rank."""
        if self.every_n_steps is not None and self._step % self.every_n_steps == 0:
            self._is_due = True
        elapsed = time.monotonic() - self._saved_at
        if self.every_n_minutes is not None and elapsed >= 60 * self.every_n_minutes:
            self._is_due = True
        return self._is_due and not self._io.is_busy

    def _save(self, trainer: L.Trainer) -> None:
        """Save the step that has ended; on every rank."""
        step, path = self._step, self._path
        data = getattr(trainer, "datamodule", None)
        # Not as storage_options, which a strategy that shards does not pass on.
        self._io.options_of_next = {
            "data": data.state_dict() if data is not None else None,
            "then": lambda: self._is_on_disk(step),
        }
        trainer.save_checkpoint(path, weights_only=False)
        self._submitted = step
        self._is_due = False
        self._saved_at = time.monotonic()
        self._is_flush_due = True

    def _is_on_disk(self, step: int) -> None:
        self._durable = step
        self._retention.add(step)
        self._retention.apply(self._folder)

    def _measured(self, path: Path, metrics: dict[str, float]) -> None:
        try:
            Manifest.read(path).with_metrics(metrics).write(path)
        except FileNotFoundError:
            pass  # It was not saved, and a line has said so.
        except (OSError, ValueError) as error:
            report(f"checkpoint: warning: {path} does not say what was measured: {reason_of(error)}")
        self._retention.apply(self._folder)

    def _finish(self, trainer: L.Trainer) -> None:
        """Bring the step that has ended to the disk; on every rank.

        Raises:
            StorageError: that cannot be done.
        """
        self._io.wait()
        (is_missing,) = self._agreement.any(trainer.is_global_zero and self._durable != self._step)
        if is_missing:
            self._save(trainer)
            self._io.wait()
        (is_missing,) = self._agreement.any(trainer.is_global_zero and self._durable != self._step)
        if is_missing:
            reason = reason_of(self._io.failure) if self._io.failure is not None else "the first rank says why"
            raise StorageError(f"checkpoint {self._path} cannot be saved: {reason}; earlier checkpoints stay")

    def _between_steps(self, trainer: L.Trainer) -> None:
        """Once a step has been logged: write the logs behind a checkpoint, and stop if that was asked for.

        Raises:
            RetryError: the training was preempted, and is saved.
        """
        if self._is_flush_due and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.flush()
        self._is_flush_due = False
        if self._has_stopped:
            raise RetryError(f"preempted at step {self._step}, saved as {self._path}; --resume goes on")


def _is_trial(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries whether everything runs; then nothing is saved."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by the trainer's connector for debugging
