"""Errors of libraries, and what each means to who started the command: one line and an exit code, or a bug."""

import re
from collections.abc import Callable

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from muse_lightning.callbacks.stop_after import last_step
from muse_lightning.errors import (
    NumericsError,
    RetryError,
    StorageError,
    UserError,
    alike,
    find_cause,
    is_storage_error,
    reason_of,
    too_long_path,
)
from muse_lightning.training.checks import interval_beyond_epoch
from muse_lightning.training.levers import Setting, next_lever

# What Lightning's callbacks say where nobody has logged what they monitor: its name, and the names of what was logged.
_UNLOGGED = {
    "EarlyStopping": re.compile(r"conditioned on metric `(.+)` which is not available\..+any of the following: (.*)"),
    "ModelCheckpoint": re.compile(r"`ModelCheckpoint\(monitor=['\"](.+)['\"]\)` could not find .+ metrics: \[(.*)\]\."),
}


def as_ending(
    error: Exception, config: Namespace, setting: Callable[[], Setting] | None
) -> UserError | RetryError | NumericsError | StorageError | None:
    """What ends a run in one line behind an error of a library; None if it is a bug.

    Args:
        config: of the command line.
        setting: makes what was trained; None where nothing was.
    """
    memory = out_of_memory(error, config, setting)
    ending = (
        memory
        or find_cause(error, RetryError)
        or find_cause(error, NumericsError)
        or find_cause(error, StorageError)
        or as_user_error(error, config)
    )
    if ending is not None:
        return ending
    if is_storage_error(error):
        return StorageError(f"the run ended, as its storage does not take what must be kept: {reason_of(error)}")
    return None


def out_of_memory(error: Exception, config: Namespace, setting: Callable[[], Setting] | None) -> UserError | None:
    """What to do next where a device has no more memory; None if that is not the error."""
    found = find_cause(error, torch.OutOfMemoryError)
    if found is None:
        return None
    wanted = str(found).split("Tried to allocate ")[-1].split(".  ")[0].split(". ")[0]
    said = f"out of GPU memory, {wanted} more was needed"
    try:
        advice = None if setting is None else next_lever(setting())
    except Exception:
        # A strategy of the user's may read values, which tensors without content do not have. The error is this one.
        advice = None
    if advice is None:
        advice = f"lower data.seq_len (now {config.data.seq_len}) or data.batch_size (now {config.data.batch_size})"
    return UserError(f"{said}; next: {advice}")


def as_user_error(error: Exception, config: Namespace) -> UserError | None:
    """The user's mistake behind an error of a library; None if it is not one."""
    mistake = find_cause(error, UserError)
    if mistake is not None:
        return mistake
    mistake = too_long_path(error)
    if mistake is not None:
        return mistake
    mistake = unlogged_monitor(error)
    if mistake is not None:
        return mistake
    message = str(error)
    if isinstance(error, MisconfigurationException):
        return UserError(f"trainer: {reason_of(error)}")
    if isinstance(error, ValueError) and "`val_check_interval`" in message:
        batches = message.partition("training batches (")[2].partition(")")[0]
        return interval_beyond_epoch(config.trainer.val_check_interval, batches)
    return None


def early_stop(trainer: L.Trainer) -> str | None:
    """Which step a callback of Lightning's has stopped a training at, and why, in one line; None if none has."""
    if not trainer.should_stop or trainer.global_step >= last_step(trainer):
        return None
    for callback in trainer.early_stopping_callbacks:
        if callback.stopping_reason_message is not None and not callback.verbose:  # else it has said so
            reason = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
            return f"stopped early, at step {trainer.global_step:,} of {trainer.max_steps:,}: {reason}"
    return None


def unlogged_monitor(error: Exception) -> UserError | None:
    """The user's mistake behind an error, where a callback of Lightning's monitors what was not logged by its first
    validation; None if that is not the error. Nobody knows earlier: any callback may log."""
    for callback, pattern in _UNLOGGED.items():
        found = pattern.search(str(error))
        if found is not None:
            monitor, logged = found[1], re.findall(r"[`'](.+?)[`']", found[2])
            nearest = f"; nearest: {', '.join(close)}" if (close := alike(monitor, logged)) else ""
            return UserError(
                f"trainer.callbacks: {callback} monitors {monitor!r}, which was not logged{nearest}; logged: "
                f"{', '.join(logged)}"
            )
    return None


def refused_by_constructor(error: Exception) -> UserError | None:
    """The user's mistake behind an error from building what a class path names; None if it is not one."""
    mistake = find_cause(error, UserError)
    if mistake is not None:
        return mistake
    # jsonargparse reports an error of such a constructor as one of a union that no member of fits.
    is_chosen_class = "Does not validate against any of the Union subtypes" in str(error)
    if is_chosen_class or find_cause(error, MisconfigurationException):
        cause = find_cause(error, MisconfigurationException) or error.__cause__ or error
        return UserError(f"a class that the configuration names cannot be built: {reason_of(cause)}")
    return None
