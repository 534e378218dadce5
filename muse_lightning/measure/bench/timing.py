"""Time, peak memory and kernels of GPU work. All of it behind one interface: the rest runs without a GPU in tests."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
"""What is timed: it starts the work; what it returns is dropped."""

WARM_UPS = 2
"""Runs before the first timed one: compilation, library handles, the allocator's first blocks."""
LEAST_REPEATS = 5
PROFILED_RUNS = 3
FLUSHED_BYTES = 256 * 1024**2
"""Written before each timed run: more than the second-level cache of any GPU, so that no run finds its inputs there."""
MATRIX_SIZE = 8192
COPIED_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of several runs of the same work."""

    median_ms: float
    min_ms: float
    p90_ms: float
    runs: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> "Timing":
        """Summarise the times of single runs."""
        median, p90 = torch.tensor(times_ms, dtype=torch.float64).quantile(torch.tensor([0.5, 0.9]).double()).tolist()
        return cls(median, min(times_ms), p90, len(times_ms))


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this process: a large matrix product, and a large copy (bytes read plus written)."""

    flops_per_s: float
    bytes_per_s: float


class Instruments(Protocol):
    """How work on one device is measured."""

    device: str

    def time(self, runs: Mapping[str, Run]) -> dict[str, Timing]:
        """Time several kinds of work, taking turns."""

    def peak_bytes(self, run: Run) -> int:
        """The most memory in use during a run, above what was in use before it."""

    def kernel_times(self, run: Run) -> dict[str, float]:
        """Milliseconds that each kernel takes in one run, by the kernel's name."""


class CudaInstruments:
    """Measures with CUDA events on the current GPU.

    Args:
        repeats: most timed runs of one kind of work.
        seconds: aimed at per kind of work; the slowest are run LEAST_REPEATS times even if that takes longer.
    """

    device = "cuda"

    def __init__(self, repeats: int, seconds: float) -> None:
        self.repeats = repeats
        self.seconds = seconds
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=self.device)

    def time(self, runs: Mapping[str, Run]) -> dict[str, Timing]:
        counts = {}
        for name, run in runs.items():
            for _ in range(WARM_UPS):
                run()
            affordable = int(1000 * self.seconds / self._finish(*self._start(run)))
            counts[name] = min(self.repeats, max(LEAST_REPEATS, affordable))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(max(counts.values(), default=0)):
            # Within a turn the host runs ahead of the device, as in training: its work is not on the clock.
            started = {name: self._start(run) for name, run in runs.items() if turn < counts[name]}
            for name, events in started.items():
                times[name].append(self._finish(*events))
        return {name: Timing.of(each) for name, each in times.items()}

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernel_times(self, run: Run) -> dict[str, float]:
        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
            for _ in range(PROFILED_RUNS):
                run()
            torch.cuda.synchronize()
        times: dict[str, float] = defaultdict(float)
        for event in profiled.events():
            # Ranges named on the host show up beside the kernels they span.
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                times[event.name] += event.time_range.elapsed_us() / 1000 / PROFILED_RUNS
        return dict(times)

    def _start(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        self._flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        return begin, end

    def _finish(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end)


def measure_ceilings(instruments: Instruments, dtype: torch.dtype) -> Ceilings:
    """Time a product of two large random matrices of this dtype, and a copy."""
    a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=instruments.device) for _ in range(2))
    source = torch.randint(0, 127, (COPIED_BYTES,), dtype=torch.int8, device=instruments.device)
    target = torch.empty_like(source)
    times = instruments.time({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return Ceilings(
        flops_per_s=2 * MATRIX_SIZE**3 / times["product"].median_ms * 1000,
        bytes_per_s=2 * COPIED_BYTES / times["copy"].median_ms * 1000,
    )
