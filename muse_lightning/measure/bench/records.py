"""What a run found, as plain records: one JSON line each, and all that tables and figure are made from."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from muse_lightning.measure.bench.error import HeadError
from muse_lightning.measure.bench.gate import Check
from muse_lightning.measure.bench.parts import Part
from muse_lightning.measure.bench.timing import Timing

Pass = Literal["forward", "forward_backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward_backward")
MIB = 1024**2


@dataclass(frozen=True)
class Measured:
    """One variant at one length."""

    variant: str
    num_tokens: int
    timings: Mapping[str, Timing]
    """By pass; empty where there is a reason."""
    peak_mib: float | None = None
    """Of a forward and backward pass, above q, k, v and the cotangent."""
    flops_fraction: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """FLOPs of the pass over its time, as a fraction of the ceiling; for variants whose work is counted."""
    reason: str | None = None
    """Why it was not timed."""


@dataclass(frozen=True)
class Results:
    """All that a run found.

    `header` holds the machine, versions, command and options; `parts` the parts of MuSe's forward and backward pass, by
    length.
    """

    header: Mapping[str, Any]
    checks: Sequence[Check]
    measured: Sequence[Measured]
    parts: Mapping[int, Sequence[Part]]
    errors: Sequence[HeadError]

    def find(self, variant: str, num_tokens: int) -> Measured | None:
        """What was measured of a variant at a length; None if nothing was."""
        return next((m for m in self.measured if (m.variant, m.num_tokens) == (variant, num_tokens)), None)

    def speedup(self, measured: Measured, over: str, of_pass: str) -> float | None:
        """How many times faster a variant is than another one at its length; None unless both were timed."""
        other = self.find(over, measured.num_tokens)
        if other is None or of_pass not in other.timings or of_pass not in measured.timings:
            return None
        return other.timings[of_pass].median_ms / measured.timings[of_pass].median_ms

    def json_lines(self) -> str:
        """The header, then a line for every check, timing, part and error."""
        records: list[dict[str, Any]] = [{"record": "header", **self.header}]
        records += [{"record": "check", **dataclasses.asdict(c), "is_passed": c.is_passed} for c in self.checks]
        for measured in self.measured:
            records += self._timing_records(measured)
        for num_tokens, parts in self.parts.items():
            records += [{"record": "part", "num_tokens": num_tokens, **dataclasses.asdict(part)} for part in parts]
        records += [{"record": "error", **dataclasses.asdict(error)} for error in self.errors]
        return "".join(json.dumps(record) + "\n" for record in records)

    def _timing_records(self, measured: Measured) -> list[dict[str, Any]]:
        start = {"record": "timing", "variant": measured.variant, "num_tokens": measured.num_tokens}
        if measured.reason is not None:
            return [{**start, "not_timed": measured.reason}]
        return [
            {
                **start,
                "pass": of_pass,
                **dataclasses.asdict(timing),
                "times_faster_than_cudnn": self.speedup(measured, "cudnn", of_pass),
                "times_faster_than_flash": self.speedup(measured, "flash", of_pass),
                "fraction_of_matmul_ceiling": measured.flops_fraction.get(of_pass),
                "peak_mib": measured.peak_mib if of_pass == "forward_backward" else None,
            }
            for of_pass, timing in measured.timings.items()
        ]
