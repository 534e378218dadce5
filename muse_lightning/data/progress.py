"""Progress of long preparation work: a rich bar on a terminal, plain lines elsewhere, both with rates."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class PreparationProgress:
    """Counts files and tokens and shows them on the standard error stream.

    Args:
        total_bytes: Listed bytes of all the work; the bar and the time left follow these.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = self._files = self._tokens = 0
        self._start = self._last_line = time.monotonic()
        console = Console(stderr=True)  # honours NO_COLOR
        self._bar = Progress(
            TextColumn("preparing"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} % {task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=max(total_bytes, 1))

    def __enter__(self) -> "PreparationProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, *, listed_bytes: int, files: int, tokens: int) -> None:
        """Add finished work."""
        self._done_bytes += listed_bytes
        self._files += files
        self._tokens += tokens
        if not self._bar.disable:
            self._bar.update(self._task, completed=self._done_bytes, description=self.rates())
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            percent = 100 * self._done_bytes / max(self._total_bytes, 1)
            print(f"data: {percent:.0f} % prepared, {self.rates()}", file=sys.stderr, flush=True)

    def rates(self) -> str:
        """Files and tokens so far, and per second."""
        seconds = max(time.monotonic() - self._start, 1e-3)
        return (
            f"{self._files:,} files ({self._files / seconds:,.0f}/s), "
            f"{self._tokens / 1e6:,.1f}M tokens ({self._tokens / seconds / 1e6:,.2f}M/s)"
        )
