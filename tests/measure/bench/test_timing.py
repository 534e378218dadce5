"""Summaries of times, and the ceilings; on a GPU, the instruments themselves."""

import pytest
import torch

from muse_lightning.measure.bench import timing
from muse_lightning.measure.bench.timing import CudaInstruments, Timing, measure_ceilings
from tests.measure.bench.fabricated import FakeInstruments


def test_a_timing_is_median_least_and_ninetieth_percentile() -> None:
    assert Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, 1.0, pytest.approx(4.6), 5)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_ceilings_count_both_directions_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MATRIX_SIZE", 10)
    monkeypatch.setattr(timing, "COPIED_BYTES", 1000)
    ceilings = measure_ceilings(FakeInstruments(), torch.bfloat16)
    # The product "takes" 1 ms, the copy 2 ms.
    assert ceilings.flops_per_s == pytest.approx(2 * 10**3 / 1e-3)
    assert ceilings.bytes_per_s == pytest.approx(2 * 1000 / 2e-3)


@pytest.mark.gpu
class TestOnAGpu:
    def test_twice_the_work_takes_twice_the_time(self) -> None:
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        times = CudaInstruments(repeats=20, seconds=0.5).time({"once": lambda: a @ a, "twice": lambda: (a @ a, a @ a)})
        assert times["once"].runs == 20
        assert 1.6 < times["twice"].median_ms / times["once"].median_ms < 2.4

    def test_slow_work_is_still_repeated(self) -> None:
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.float32)
        assert CudaInstruments(repeats=9, seconds=1e-6).time({"slow": lambda: a @ a})["slow"].runs == 5

    def test_peak_and_kernels(self) -> None:
        instruments = CudaInstruments(repeats=5, seconds=0.1)
        x = torch.zeros(2**20, device="cuda")
        assert instruments.peak_bytes(lambda: (x + 1) * 2) == 2 * x.nbytes
        kernels = instruments.kernel_times(lambda: x + 1)
        assert len(kernels) == 1
        assert 0 < sum(kernels.values()) < 1
