"""Where the time of one forward and backward pass goes: kernels grouped by the step whose name they carry."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from muse_kernels.cost import NO_WORK, Work
from muse_lightning.measure.bench.timing import Ceilings

OTHER = "other"
BETWEEN = "between kernels"

_PART_OF_STEP = {
    "cluster": "clustering",
    "gather": "gather",
    "summaries": "stage 1",
    "scores": "scores",
    "select": "selection",
    "select_by_peaks": "scores",
    "far": "far",
    "far_backward": "far backward",
    "retrieved_partials": "keys backward",
    "key_gradients": "keys backward",
}
"""Beginning of a kernel's name after `muse_` -> part, as `muse_work` names it. The longest beginning counts."""

_RUN_AGAIN = ("gather", "stage 1")
"""Parts whose kernels the backward pass runs again under the same name."""

_IS_LIBRARY = re.compile(r"cudnn|flash|fmha|sdpa|attention", re.IGNORECASE)
_IS_BACKWARD = re.compile(r"bwd|bprop|backward|dot_do|convert_dq", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """Time of one part, and what it had to do, where that is counted."""

    name: str
    ms: float
    share: float
    """Of the whole pass."""
    work: Work = NO_WORK
    flops_fraction: float | None = None
    """Of the measured ceiling; None where the part has no matrix products that are counted."""
    bytes_fraction: float | None = None


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to, from its name: our own steps, library attention ("near"), or OTHER."""
    found = re.search(r"\bmuse_([A-Za-z0-9_]+)", kernel)
    if found:
        steps = [step for step in _PART_OF_STEP if f"{found[1]}_".startswith(f"{step}_")]
        return _PART_OF_STEP[max(steps, key=len)] if steps else found[1].replace("_", " ")
    if _IS_LIBRARY.search(kernel):
        return "near backward" if _IS_BACKWARD.search(kernel) else "near"
    return OTHER


def split_into_parts(
    kernel_times: Mapping[str, float], total_ms: float, work: Mapping[str, Work], ceilings: Ceilings
) -> list[Part]:
    """Group kernels, in the order in which the parts run.

    Args:
        kernel_times: milliseconds by kernel.
        total_ms: of the whole pass, timed without a profiler; what no kernel accounts for is BETWEEN.
        work: of each part; parts that no kernel belongs to are left out.
        ceilings: measured in the same process.
    """
    times: dict[str, float] = defaultdict(float)
    for kernel, ms in kernel_times.items():
        times[part_of(kernel)] += ms
    order = list(work)
    names = sorted((name for name in times if name != OTHER), key=lambda name: _position(name, order))
    parts = [_part(name, times[name], total_ms, _work_of(name, work), ceilings) for name in names]
    parts.append(_part(OTHER, times.get(OTHER, 0.0), total_ms, NO_WORK, ceilings))
    # Kernels that overlap, or a profiler that slows them, can add up to more than the pass.
    parts.append(_part(BETWEEN, max(0.0, total_ms - sum(times.values())), total_ms, NO_WORK, ceilings))
    return parts


def _part(name: str, ms: float, total_ms: float, work: Work, ceilings: Ceilings) -> Part:
    seconds = ms / 1000
    flops_fraction, bytes_fraction = (
        amount / seconds / ceiling if amount and seconds else None
        for amount, ceiling in ((work.flops, ceilings.flops_per_s), (work.bytes, ceilings.bytes_per_s))
    )
    return Part(name, ms, ms / total_ms, work, flops_fraction, bytes_fraction)


def _work_of(name: str, work: Mapping[str, Work]) -> Work:
    again = work.get(f"{name} backward", NO_WORK) if name in _RUN_AGAIN else NO_WORK
    return work.get(name, NO_WORK) + again


def _position(name: str, order: list[str]) -> tuple[int, str]:
    """Where a part comes: those without counted work follow the one that they belong to, strangers are last."""
    anchor = "scores" if name == "selection" else name
    return (2 * order.index(anchor) + (anchor != name) if anchor in order else 2 * len(order), name)
