"""Fail unless a run learned: read a loss back from its TensorBoard events.

Usage: python tools/check_loss.py RUN_FOLDER [--tag train/loss]

RUN_FOLDER is searched for event files at any depth; it must hold those of exactly one run.
"""

import argparse
import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalar(folder: Path, tag: str) -> list[float]:
    """All values logged under `tag` in the one run below `folder`, in the order of steps."""
    runs = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    if len(runs) != 1:
        raise SystemExit(f"{folder}: expected the event files of one run, found {len(runs)} folders with event files")
    events = EventAccumulator(str(runs.pop()), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if tag not in tags:
        raise SystemExit(f"{folder}: no tag {tag}, only {', '.join(tags) or 'none'}")
    return [event.value for event in sorted(events.Scalars(tag), key=lambda event: event.step)]


def main() -> None:
    """Print the first and last value; exit with 1 unless all are finite and the last is lower than the first."""
    parser = argparse.ArgumentParser(description="Fail unless a run learned, by a loss in its event files.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--tag", default="train/loss")
    arguments = parser.parse_args()
    values = read_scalar(arguments.run_folder, arguments.tag)
    print(f"{arguments.tag}: {values[0]:.4f} at first, {values[-1]:.4f} at last, {len(values)} values")
    if len(values) < 2 or not all(map(math.isfinite, values)) or values[-1] >= values[0]:
        raise SystemExit(f"{arguments.run_folder}: {arguments.tag} did not fall")


if __name__ == "__main__":
    main()
