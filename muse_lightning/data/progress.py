"""Progress of long preparation work: a rich bar on a terminal, plain lines elsewhere, both with rates and the time
left."""

import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 10.0


class StageProgress:
    """Counts the bytes, files and tokens of one stage and shows them on the standard error stream.

    Args:
        stage: What is done, as "reading".
        total_bytes: Bytes of all the work, about; the bar and the time left follow these.
    """

    def __init__(self, stage: str, total_bytes: int) -> None:
        self.stage = stage
        self.finished_before = 0
        self._total_bytes = total_bytes
        self._bytes_before = 0
        self._counts = [0, 0, 0]  # bytes, files, tokens
        self._others: list[Sequence[int]] = []
        self._lock = threading.Lock()
        self._start = self._last_line = time.monotonic()
        console = Console(stderr=True)  # honours NO_COLOR
        self._bar = Progress(
            TextColumn(stage),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} % {task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=max(total_bytes, 1))

    def __enter__(self) -> "StageProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, size: int, files: int, tokens: int) -> None:
        """Count work done by this process; any thread may call it."""
        with self._lock:
            for index, count in enumerate((size, files, tokens)):
                self._counts[index] += count

    def follow(self, counts: Sequence[int]) -> None:
        """Count what other processes add up in shared memory: bytes, files, tokens."""
        self._others.append(counts)

    def was_done(self, size: int) -> None:
        """Count a job that an earlier call finished. It is work done, but not at this call's speed."""
        self._bytes_before += size
        self.finished_before += 1

    def totals(self) -> tuple[int, int, int]:
        """Bytes, files and tokens of this call."""
        size, files, tokens = (own + sum(o[i] for o in self._others) for i, own in enumerate(self._counts))
        return size, files, tokens

    def show(self) -> None:
        """Show where the work is, at most every few seconds where there is no terminal."""
        if not self._bar.disable:
            self._bar.update(self._task, completed=self._bytes_before + self.totals()[0], description=self.rates())
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            percent = 100 * (self._bytes_before + self.totals()[0]) / max(self._total_bytes, 1)
            print(f"data: {self.stage}: {percent:.0f} %, {self.rates()}", file=sys.stderr, flush=True)

    def rates(self, is_done: bool = False) -> str:
        """Files and tokens (bytes, as long as there are no tokens) so far and per second, and the time left."""
        size, files, tokens = self.totals()
        seconds = max(time.monotonic() - self._start, 1e-3)
        amount, unit = (tokens, "tokens") if tokens else (size, "B")
        left = None
        if size and not is_done:
            left = max(self._total_bytes - self._bytes_before - size, 0) * seconds / size
        return (
            f"{files:,} files ({files / seconds:,.0f}/s), {amount / 1e6:,.1f}M {unit} "
            f"({amount / seconds / 1e6:,.2f}M/s){'' if left is None else f', {_clock(left)} left'}"
        )


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
