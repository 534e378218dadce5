"""What the libraries below are kept from while a verb runs: messages nobody can act on, imports nobody needs."""

import gc
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from muse_lightning.errors import StorageError, reason_of

WARNINGS = (
    # Lightning 2.6 asks torch in a way that torch deprecates; only a new Lightning can change it.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Predictions are numbered by batch, in stored order.
    r"Couldn't infer the batch indices fetched from your dataloader",
    # What evaluates a checkpoint has no guard of training steps.
    r"Be aware that when using `ckpt_path`, callbacks .*: \['NumericsGuard'\]\.",
    # Of a user's own ModelCheckpoint: every run has a folder of its own, or goes on in it.
    r"The dirpath has changed from .* therefore `best_model_score`",
    r"Checkpoint directory .* exists and is not empty",
)
LOG_LINES = (
    # An advertisement for a hosted service.
    "💡 Tip:",
    # config.yaml and environment.json have it; it would stand before the one line of a mistake.
    "Seed set to ",
)
LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
UNNEEDED = ("transformers", "matplotlib", "torchvision")
"""torchmetrics, which Lightning imports, imports these if they are installed, for metrics of text and images and plots.

A torchvision that was built for another torch cannot be imported at all.
"""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, the listed warnings and log lines are dropped; everything else is shown."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_wanted)
    try:
        with warnings.catch_warnings():
            for pattern in WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_wanted)


@contextmanager
def importing() -> Iterator[None]:
    """Inside, Python looks for no garbage, and what is there at the end, it takes for what stays.

    Modules are nearly all of that: to look through them again and again would be a fifth of the CPU time of a command's
    start. In a process that has Lightning already it is a caller's to decide.
    """
    if "lightning" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def import_lightning() -> None:
    """Import Lightning without what torchmetrics would bring along: 1.5 instead of 3.0 CPU seconds where measured.

    Raises:
        StorageError: there is no folder for temporary files, or the one of TORCHINDUCTOR_CACHE_DIR cannot be made; the
            libraries ask for both as they are imported.
    """
    writable = f"accepted: a folder that user id {os.getuid()} can write to"
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise StorageError(f"TMPDIR={os.environ.get('TMPDIR', '')}: {reason_of(error)}; {writable}") from error
    from lightning_utilities.core.imports import RequirementCache

    ask = RequirementCache.__bool__

    def ask_for_needed(cache: RequirementCache) -> bool:
        return not str(cache.requirement).startswith(UNNEEDED) and ask(cache)

    RequirementCache.__bool__ = ask_for_needed  # type: ignore[method-assign, assignment]
    try:
        import_module("lightning.pytorch")
    except OSError as error:
        folder = os.environ.get(CACHE_VARIABLE)
        if folder is None or error.filename is None or not Path(folder).is_relative_to(error.filename):
            raise
        raise StorageError(f"{CACHE_VARIABLE}={folder}: {error.filename}: {reason_of(error)}; {writable}") from error
    finally:
        RequirementCache.__bool__ = ask  # type: ignore[method-assign]


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOG_LINES)
