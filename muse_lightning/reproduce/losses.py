"""The losses that two runs have logged, compared step by step."""

import math
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.data.ledger import FOLDER_NAME, LedgerBatch, ledger_path, read_ledger
from muse_lightning.errors import UserError

TRAIN_LOSS = "train/loss"
TAGS = (TRAIN_LOSS, "val/loss")

Losses = dict[int, float]
"""By step, as logged: the first step is 0, values are float32."""


@dataclass(frozen=True)
class Agreement:
    """How one tag of two runs agrees.

    Attributes:
        tag: Of both.
        wanted: Steps at which the first run logged it.
        different: Steps at which the second logged another value, or none, with both values.
    """

    tag: str
    wanted: int
    different: list[tuple[int, float, float | None]]

    @property
    def largest(self) -> float:
        """The largest difference; infinite where a value is missing, or not a number on one side only."""
        gaps = (math.inf if now is None else abs(then - now) for _, then, now in self.different)
        return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)

    def __str__(self) -> str:
        same = f"at {self.wanted - len(self.different)} of {self.wanted} logged steps"
        if not self.different:
            return f"{self.tag}: equal bit for bit {same}"
        step, then, now = self.different[0]
        shown = "nothing" if now is None else f"{now:.9g}"
        first = f"first difference at step {step}: {then:.9g} then, {shown} now"
        return f"{self.tag}: {first}; largest {self.largest:.2g}; equal {same}"


def logged_losses(run: Path) -> dict[str, Losses]:
    """What a run has logged, by tag of `TAGS`, from its TensorBoard events; of a step that was logged twice, the last.

    Raises:
        UserError: it has logged no training loss there.
    """
    # 0: all of them, not a sample.
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = events.Tags()["scalars"]
    if TRAIN_LOSS not in found:
        raise UserError(f"run: {run} has no TensorBoard events with {TRAIN_LOSS}: there is nothing to compare with")
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in TAGS if tag in found}


def compare(then: dict[str, Losses], now: dict[str, Losses], steps: int) -> list[Agreement]:
    """How the losses of the first `steps` steps agree, tag by tag; of a step that only the second run has, nothing."""
    agreements = []
    for tag, losses in then.items():
        wanted = {step: loss for step, loss in losses.items() if step < steps}
        found = now.get(tag, {})
        different = [(step, loss, found.get(step)) for step, loss in sorted(wanted.items())]
        different = [(step, loss, other) for step, loss, other in different if not _is_same(loss, other)]
        if wanted:
            agreements.append(Agreement(tag, len(wanted), different))
    return agreements


def _is_same(then: float, now: float | None) -> bool:
    return now is not None and (then == now or (math.isnan(then) and math.isnan(now)))


def first_other_batch(then: Path, now: Path) -> int | None:
    """Number of the first batch that the first ranks of two runs read otherwise; None if those that both have agree."""
    paths = [ledger_path(run / FOLDER_NAME, 0) for run in (then, now)]
    if not all(path.is_file() for path in paths):
        return None
    of_then, of_now = (
        {entry.batch: entry.hash for entry in read_ledger(path) if isinstance(entry, LedgerBatch)} for path in paths
    )
    return min((batch for batch in of_then.keys() & of_now.keys() if of_then[batch] != of_now[batch]), default=None)
