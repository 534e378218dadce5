"""Trainings side by side, from their event files: a table, four plots and the raw data.

Usage: python tools/training_results.py OUT NAME=RUN_FOLDER... [--evaluated NAME=RUN_FOLDER...]

OUT: path without ending; writes OUT.jsonl and OUT.png. A run folder is runs/NAME/version_N, of `muse fit` or, after
--evaluated, of `muse validate`; the first training is what the others are compared with. Refuses trainings of different
datasets, or seen tokens: their losses say nothing about each other; and compares times only of one kind of GPU.

Columns: the last validation loss by exact attention, and by how much it differs from the first training's; of the
training losses of the second half of the logged steps, the mean difference from the first training of the same seed,
which had the same batches, with its standard error over steps; the validation loss by the training's own attention;
bits per byte; the loss where few and where many tokens are in sight; the median of tokens per second and device;
seconds to the end, the first training's exact loss by then, between its validations, and seconds to an exact loss as
low as its last.

Seconds are those since the first scalar that a run logged. Those of a run that was resumed are summed over its starts,
each from its first scalar to the last that no later start replaced: pauses between starts, setting up, the steps before
a start's first scalar, and steps that were lost and taken again do not count.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

EXACT, OWN, TRAIN, ERROR, TOKENS = "val/loss_exact", "val/loss", "train/loss", "muse/relative_error", "train/tokens"
POSITION = "val/loss_by_position/"
FEWEST_IN_SIGHT = 128
"""Of what is drawn: with fewer tokens in sight all losses are high, and alike."""
LEFT_OUT = ("lr-", "time/", "memory/", "epoch", "hp_metric", "train/skipped", "train/consecutive", "val/ppl")
"""Of the raw data: what the table does not need, or can be computed."""


@dataclass(frozen=True)
class Point:
    """A scalar: after how many steps, after how many seconds, of which the file's head says what counts, its value."""

    step: int
    seconds: float
    value: float


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        environment: its environment.json.
        attention: as its recipe has it.
        scalars: points by tag, in order of steps.
    """

    name: str
    environment: dict[str, Any]
    attention: Any
    scalars: dict[str, list[Point]]

    @property
    def dataset(self) -> list[str]:
        """Fingerprints of what it was trained on."""
        return [data["fingerprint"] for data in self.environment["data"]]

    def last(self, tag: str) -> float | None:
        """The value of the newest point."""
        return self.scalars[tag][-1].value if tag in self.scalars else None

    def exact(self) -> list[Point]:
        """Validation losses by exact attention, which of a run with exact attention are its own."""
        return self.scalars.get(EXACT) or self.scalars.get(OWN, [])


def read_run(name: str, folder: Path) -> Run:
    """Raises SystemExit, in one line, if something of a run is not there."""
    for file in ("environment.json", "config.yaml"):
        if not (folder / file).is_file():
            raise SystemExit(f"{name}={folder}: has no {file}; give the folder of a run, such as runs/demo/version_0")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    if not found:
        raise SystemExit(f"{name}={folder}: has no scalars in its event files")
    pauses = find_pauses(_starts(folder), {event.wall_time for of_tag in found.values() for event in of_tag})
    scalars = {
        tag: [Point(e.step, e.wall_time - sum(s for at, s in pauses if at <= e.wall_time), e.value) for e in of_tag]
        for tag, of_tag in found.items()
    }
    environment = json.loads((folder / "environment.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return Run(name, environment, config["model"]["attention"], scalars)


def _starts(folder: Path) -> list[float]:
    """When each start of a run logged its first scalar: each start has an event file."""
    starts = []
    for file in folder.glob("events.out.tfevents.*"):
        events = LegacyEventFileLoader(str(file)).Load()
        times = [e.wall_time for e in events if any(value.HasField("simple_value") for value in e.summary.value)]
        starts += [min(times)] if times else []
    return sorted(starts)


def find_pauses(starts: Sequence[float], logged: Set[float]) -> list[tuple[float, float]]:
    """What does not count of a run's time: until when, and how many seconds.

    Args:
        starts: the first scalar of each start, what others have replaced included.
        logged: the times of all scalars that were not replaced.
    """
    pauses, ended = [], 0.0
    for start, next_start in itertools.pairwise([*starts, math.inf]):
        own = [time for time in logged if start <= time < next_start]
        if own:
            pauses.append((min(own), min(own) - ended))
            ended = max(own)
    return pauses


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises SystemExit if losses of these trainings must not be set beside each other."""
    for run in runs[1:]:
        if run.dataset != runs[0].dataset:
            raise SystemExit(f"{run.name}: trained on dataset {run.dataset}, {runs[0].name} on {runs[0].dataset}")
        if run.last(TOKENS) != runs[0].last(TOKENS):
            tokens = (run.last(TOKENS), runs[0].last(TOKENS))
            raise SystemExit(f"{run.name}: saw {tokens[0]:,.0f} tokens, {runs[0].name} {tokens[1]:,.0f}")


def seconds_to(run: Run, loss: float) -> float | None:
    """Until the first validation at which the loss by exact attention was no higher; None if that never was."""
    return next((point.seconds for point in run.exact() if point.value <= loss), None)


def loss_at(run: Run, seconds: float) -> float | None:
    """The loss by exact attention, on a line between two validations; None outside of them."""
    for before, after in itertools.pairwise(run.exact()):
        if before.seconds <= seconds <= after.seconds:
            part = (seconds - before.seconds) / (after.seconds - before.seconds)
            return before.value + part * (after.value - before.value)
    return None


def step_by_step(run: Run, twin: Run) -> tuple[float, float] | None:
    """Mean difference of training losses from those of a training with the same batches, over the second half of the
    steps that both logged, and its standard error; None for fewer than two of them."""
    losses = {point.step: point.value for point in twin.scalars.get(TRAIN, [])}
    found = [point.value - losses[point.step] for point in run.scalars.get(TRAIN, []) if point.step in losses]
    found = found[len(found) // 2 :]
    return (statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))) if len(found) > 1 else None


def table(runs: Sequence[Run]) -> str:
    """A Markdown table, a row for each training."""
    first = runs[0]
    end = first.exact()[-1].value
    lines = [
        "| training | seed | loss, exact attention | to the first | step by step | loss, its own | bits per byte "
        "| short | long | tokens/s | seconds | the first's loss by then | to the first's loss |",
        "|" + " --- |" * 13,
    ]
    for run in runs:
        exact = run.exact()[-1]
        same_device = run.environment["devices"] == first.environment["devices"]
        reached = seconds_to(run, end) if same_device else None
        twin = next(other for other in runs if other.environment["seed"] == run.environment["seed"])
        paired = None if twin is run else step_by_step(run, twin)
        rates = sorted(point.value for point in run.scalars.get("throughput/device/tokens_per_sec", []))
        cells = [
            run.name,
            run.environment["seed"],
            f"{exact.value:.4f}",
            f"{exact.value / end - 1:+.2%}",
            "-" if paired is None else f"{paired[0]:+.4f} ± {paired[1]:.4f}",
            *(_number(run.last(tag), ".4f") for tag in (OWN, "val/bpb", "val/loss_short", "val/loss_long")),
            _number(rates[len(rates) // 2] if rates else None, ",.0f"),
            f"{exact.seconds:.0f}" if same_device else "another device",
            _number(loss_at(first, exact.seconds) if same_device else None, ".4f"),
            _number(reached, ".0f"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def evaluations(runs: Sequence[Run]) -> str:
    """A Markdown table of all scalars of validations, a column for each."""
    tags = sorted({tag for run in runs for tag in run.scalars if tag.startswith("val/") and POSITION not in tag})
    lines = ["| | " + " | ".join(run.name for run in runs) + " |", "| --- |" + " --- |" * len(runs)]
    lines += [f"| `{tag}` | " + " | ".join(_number(run.last(tag), ".4f") for run in runs) + " |" for tag in tags]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Loss over tokens, over time, by position at the end; and the error of live attention over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (by_tokens, by_time), (by_position, error) = figure.subplots(2, 2)
    for number, run in enumerate(runs):
        style = {"label": run.name, "linewidth": 1.2, "color": f"C{number}"}
        total = run.last(TOKENS)
        exact = run.exact()
        per_step = (total or 0.0) / max(exact[-1].step, 1) / 1e6
        by_tokens.plot([p.step * per_step for p in exact], [p.value for p in exact], **style)
        by_time.plot([p.seconds / 60 for p in exact], [p.value for p in exact], **style)
        ends = sorted((int(tag.removeprefix(POSITION)), tag) for tag in run.scalars if tag.startswith(POSITION))
        ends = [(start, tag) for start, tag in ends if start >= FEWEST_IN_SIGHT]
        by_position.plot([start for start, _ in ends], [run.scalars[tag][-1].value for _, tag in ends], **style)
        errors = run.scalars.get(ERROR, [])
        error.plot([p.step * per_step for p in errors], [p.value for p in errors], **style)
    by_tokens.set(xlabel="million tokens", ylabel="validation loss, exact attention")
    by_time.set(xlabel="minutes, with validations", ylabel="validation loss, exact attention")
    by_position.set(xlabel="tokens in sight, to twice as many", ylabel="validation loss, its own attention")
    by_position.set_xscale("log", base=2)
    error.set_yscale("log")
    error.set(xlabel="million tokens", ylabel="relative squared error of live attention")
    for axes in (by_tokens, by_time, by_position, error):
        axes.grid(alpha=0.3)
    by_tokens.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def write_raw(runs: Sequence[Run], path: Path) -> None:
    """A line for each run and for each of its scalars."""
    with path.open("w") as lines:
        for run in runs:
            header = {"record": "run", "name": run.name, "attention": run.attention}
            for key in ("command", "seed", "data", "devices", "driver", "cuda", "python", "packages", "git_revision"):
                header[key] = run.environment.get(key)
            lines.write(json.dumps(header) + "\n")
            for tag, points in sorted(run.scalars.items()):
                if not tag.startswith(LEFT_OUT):
                    rows = [[p.step, round(p.seconds, 1), float(f"{p.value:.6g}")] for p in points]
                    lines.write(json.dumps({"record": "scalar", "name": run.name, "tag": tag, "points": rows}) + "\n")


def main(args: Sequence[str] | None = None) -> int:
    """Read, compare, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="path without ending")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_FOLDER")
    parser.add_argument("--evaluated", nargs="+", default=[], metavar="NAME=RUN_FOLDER")
    options = parser.parse_args(args)
    read = []
    for pairs in (options.runs, options.evaluated):
        for pair in pairs:
            name, equals, folder = pair.partition("=")
            if not equals:
                raise SystemExit(f"{pair}: give NAME=RUN_FOLDER")
            read.append(read_run(name, Path(folder)))
    trained, evaluated = read[: len(options.runs)], read[len(options.runs) :]
    for run in trained:
        for tag, points in ((TOKENS, run.scalars.get(TOKENS)), (OWN, run.exact())):
            if not points:
                raise SystemExit(f"{run.name}: has no {tag}; give a fit here, validations after --evaluated")
    check_comparable(trained)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_raw(read, options.out.with_name(options.out.name + ".jsonl"))
    draw(trained, options.out.with_name(options.out.name + ".png"))
    print(table(trained))
    if evaluated:
        print("\n" + evaluations(evaluated))
    return 0


if __name__ == "__main__":
    sys.exit(main())
