"""What a run has beside what its recipe names: a logger, callbacks and a way to save, each unless there is another."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger

from muse_lightning.callbacks import DEFAULT_CALLBACKS, LONG_CONTEXT_CALLBACKS, Banner
from muse_lightning.callbacks.environment_file import EnvironmentFile
from muse_lightning.callbacks.ledger import Ledger
from muse_lightning.callbacks.prediction_files import PredictionFiles
from muse_lightning.callbacks.progress import progress_bar
from muse_lightning.callbacks.run_text import RunText
from muse_lightning.callbacks.scalar_layout import ScalarLayout
from muse_lightning.callbacks.stop_evaluation import StopEvaluation
from muse_lightning.checkpoints.choice import step_of
from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.data.ledger import FOLDER_NAME
from muse_lightning.errors import UserError
from muse_lightning.numerics.guard import FOLDER_NAME as NUMERICS_FOLDER
from muse_lightning.numerics.guard import NumericsGuard
from muse_lightning.training.event_log import EventLog
from muse_lightning.training.run_folder import RunFolder


def run_logger(chosen: Any, folder: RunFolder) -> Logger | Sequence[Logger] | bool:
    """The user's loggers, `trainer.logger`, or TensorBoard's events in the folder of the run."""
    if chosen not in (None, True):
        return chosen
    # What was logged after the checkpoint is logged again.
    purge_step = None if folder.resumed is None else step_of(folder.resumed)
    save_dir, name = folder.path.parent.parent, folder.path.parent.name
    return EventLog(save_dir=save_dir, name=name, version=folder.path.name, purge_step=purge_step)


def run_callbacks(
    verb: str,
    trainer: Namespace,
    folder: RunFolder,
    *,
    settings: str,
    environment: Mapping[str, Any],
    verify_every: int | None,
) -> list[Callback]:
    """The user's callbacks, and the default ones of kinds that the user has none of.

    Args:
        verb: fit, validate, test or predict.
        trainer: arguments of the trainer, with objects for classes.
        folder: of the run.
        settings: the whole configuration, as YAML.
        environment: what the run depends on beside it, as plain data.
        verify_every: of the command line, which wins over a `NumericsGuard` of the user's; None: as that says.
    Raises:
        UserError: one of ours is there twice, or one would save where no resume finds it.
    """
    given = trainer["callbacks"] or []
    callbacks = list(given) if isinstance(given, list) else [given]
    _check_once(callbacks)
    _check_file_names(callbacks)
    kinds: list[tuple[bool, type[Callback], Callable[[], Callback]]] = [
        (trainer["enable_progress_bar"] is not False, ProgressBar, progress_bar),
        (trainer["logger"] is not False, LearningRateMonitor, lambda: LearningRateMonitor("step")),
        (trainer["enable_checkpointing"] is not False, Checkpoint, DurableCheckpoint),
        (verb == "fit" and trainer["enable_progress_bar"] is not False, Banner, Banner),
        (True, EnvironmentFile, lambda: EnvironmentFile(folder, environment)),
        (verb in ("fit", "validate"), ScalarLayout, ScalarLayout),
        (verb in ("fit", "validate"), RunText, lambda: RunText(settings, environment)),
        (verb == "fit", Ledger, lambda: Ledger(folder.path / FOLDER_NAME)),
        (verb == "fit", NumericsGuard, NumericsGuard),
        (verb == "predict", PredictionFiles, lambda: PredictionFiles(folder.path / "predictions")),
        *((verb in ("fit", "validate"), kind, kind) for kind in DEFAULT_CALLBACKS),
        *((verb == "validate", kind, kind) for kind in LONG_CONTEXT_CALLBACKS),
        # Behind all others: with its last hook the evaluation is complete.
        (verb != "fit", StopEvaluation, StopEvaluation),
    ]
    for is_wanted, kind, make in kinds:
        if is_wanted and not any(isinstance(callback, kind) for callback in callbacks):
            callbacks.append(make())
    for callback in callbacks:
        # Where --resume looks; a logger of the user's may have a folder elsewhere.
        if isinstance(callback, DurableCheckpoint) and callback.dirpath is None and folder.is_owner:
            callback.dirpath = folder.checkpoints
        if isinstance(callback, NumericsGuard):
            callback.dirpath = callback.dirpath or folder.path / NUMERICS_FOLDER
            callback.verify_every = verify_every or callback.verify_every
            callback.settings = settings
    return callbacks


def run_plugins(trainer: Namespace) -> list[Any]:
    """The user's plugins, and our way to save unless there is another."""
    chosen = trainer["plugins"]
    plugins = list(chosen) if isinstance(chosen, list) else [] if chosen is None else [chosen]
    has_io = getattr(trainer["strategy"], "_checkpoint_io", None) is not None
    if has_io or any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        return plugins
    return [*plugins, DurableCheckpointIO()]


def _check_once(callbacks: Sequence[Callback]) -> None:
    """Ours act on all of a training and log under names of their own; Lightning's may watch several things."""
    counts = Counter(type(callback) for callback in callbacks)
    for kind, count in counts.items():
        if count > 1 and kind.__module__.startswith("muse_lightning."):
            raise UserError(
                f"trainer.callbacks: {kind.__name__} is given {count} times; accepted: once. A recipe's own is changed "
                "by --trainer.callbacks.NAME=VALUE before any --trainer.callbacks+="
            )


def _check_file_names(callbacks: Sequence[Callback]) -> None:
    """A `/`, which names of metrics have, would be one more folder in that of the run's checkpoints."""
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.dirpath is not None:
            continue
        name = callback.filename or ""
        # Lightning writes the names of metrics before their values unless told not to.
        if "/" in (name if callback.auto_insert_metric_name else re.sub(r"\{.*?\}", "", name)):
            raise UserError(
                f"trainer.callbacks: ModelCheckpoint.filename is {name!r}, whose / makes folders, in which --resume "
                "finds nothing; accepted: names without, such as 'step={step}-loss={val/loss:.2f}' with "
                "auto_insert_metric_name: false"
            )
