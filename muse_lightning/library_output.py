"""Library messages that a user can do nothing about, kept off the terminal. One entry per message, with its reason."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS: tuple[str, ...] = ()
LOG_LINES = (
    # An advertisement for a hosted service.
    "💡 Tip:",
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, the listed warnings and log lines are dropped; everything else is shown."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_is_wanted)
    try:
        with warnings.catch_warnings():
            for pattern in WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        logger.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOG_LINES)
