"""Measurements made up for tests, and instruments that need no GPU."""

from collections.abc import Mapping

import torch

from muse_kernels.attention.options import MuseOptions
from muse_lightning.measure.bench.command import Settings
from muse_lightning.measure.bench.error import HeadError
from muse_lightning.measure.bench.gate import Check
from muse_lightning.measure.bench.inputs import Heads
from muse_lightning.measure.bench.parts import Part
from muse_lightning.measure.bench.records import Measured, Results
from muse_lightning.measure.bench.timing import Run, Timing

MIB = 1024**2
SMALL = MuseOptions(chunk=64, query_cluster=16, key_cluster=16, top_k=2, exact_below=0)
HEADER = {
    "device": "Imaginary GPU, 80 GiB, sm_90",
    "driver": "1.2",
    "cuda": "13.0",
    "python": "3.11.1",
    "muse_lightning": "0.1.0",
    "git_revision": "abc123",
    "packages": {"torch": "2.13.0", "triton": "3.7.1"},
    "date": "2026-11-24T12:00:00+00:00",
    "command": "muse bench attention",
    "options": {"heads": 16, "muse": {"chunk": 2048}},
    "ceilings": {"flops_per_s": 800e12, "bytes_per_s": 3e12},
}


class FakeInstruments:
    """Runs everything once on the CPU; a millisecond for the n-th thing that is timed is n."""

    device = "cpu"

    def __init__(self) -> None:
        self.timed: list[str] = []

    def time(self, runs: Mapping[str, Run]) -> dict[str, Timing]:
        for run in runs.values():
            run()
        self.timed += runs
        return {name: Timing(number, number - 0.5, number + 0.5, 7) for number, name in enumerate(runs, start=1)}

    def peak_bytes(self, run: Run) -> int:
        run()
        return 3 * MIB

    def kernel_times(self, run: Run) -> dict[str, float]:
        run()
        return {"muse_far": 0.5, "muse_far_backward": 0.25, "cudnn_sdpa_fprop": 0.75, "elementwise": 0.1}


def settings(**changes: object) -> Settings:
    """Small enough for a CPU."""
    values: dict[str, object] = {
        "muse": SMALL,
        "lengths": (256,),
        "heads": Heads(4, 2, 16, torch.bfloat16),
        "documents": (),
        "recorded": {},
        "uses_recorded": False,
        "peers": ("flash", "nsa", "reference"),
    }
    return Settings(**(values | changes))


def results() -> Results:
    """Two lengths, MuSe and peers, one of which was not timed."""
    measured = []
    for num_tokens, times in ((16384, (1.0, 2.0, 4.0)), (65536, (4.0, 32.0, 64.0))):
        for variant, ms in zip(("muse", "cudnn", "flash"), times, strict=True):
            timings = {
                "forward": Timing(ms, ms - 0.01, ms + 0.02, 9),
                "forward_backward": Timing(3 * ms, 3 * ms - 0.1, 3 * ms + 0.2, 9),
            }
            measured.append(Measured(variant, num_tokens, timings, 1234.5, {"forward_backward": 0.5}))
        measured.append(Measured("nsa", num_tokens, {}, reason="not installed"))
    parts = {65536: [Part("far", 3.0, 0.25), Part("other", 9.0, 0.75)]}
    errors = [HeadError("layer1_head3", 16384, 16, 0.055, 0.9, 0.91, 0.97)]
    return Results(HEADER, [Check("one document", "dq (mean)", 0.001, 0.002)], measured, parts, errors)
