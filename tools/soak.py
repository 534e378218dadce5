"""Does a training leak? Train a tiny model for a long time, and fit a slope to its memory, descriptors and disk.

Usage: python tools/soak.py FOLDER [--minutes 60] [--every 5] [-- FLAGS OF muse fit]

Runs `muse fit` on a model of two layers, with MuSe attention and two data workers, which validates and saves every 50
steps, and stops it by SIGTERM. Writes FOLDER/samples.jsonl and FOLDER/soak.png, and prints one line for each quantity.
Exit code 1 if one grows that must not, or if the training ends by itself. Linux only: it reads /proc.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[1]
RECIPES = (ROOT / "recipes" / "demo.yaml", ROOT / "recipes" / "overlays" / "smoke.yaml")
FLAGS = (
    "--trainer.max_steps=100000000",
    "--trainer.val_check_interval=50",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.limit_val_batches=4",
    "--trainer.log_every_n_steps=10",
    "--trainer.enable_model_summary=false",
    "--data.num_workers=2",
    "--data.batch_size=4",
    # Clusters of 8 in chunks of 32: MuSe approximates at the 256 tokens of the overlay.
    "--model.attention.chunk=32",
    "--model.attention.query_cluster=8",
    "--model.attention.key_cluster=8",
    "--model.attention.exact_below=0",
)
WARM_UP = 0.25
"""Part of the samples that the fits leave out: caches fill, and the allocator finds its size."""
BLOCKS = 12
"""Samples are averaged in so many blocks before the fit: neighbours in time are alike, averages of minutes hardly."""
ERRORS = 3.0
"""A slope of fewer standard errors is none."""
TOLERATED_GROWTH = 0.02
"""Nor is growth, between warm-up and end, of a smaller part of the mean."""
STOP_S = 120
"""Time to stop after SIGTERM: it saves."""


@dataclass(frozen=True)
class Sample:
    """A process with all its descendants at one time, and what it has written."""

    seconds: float
    """Since the first sample."""
    step: int
    """Of the newest checkpoint; 0 for none."""
    rss_mib: float
    """Resident memory of the process alone."""
    pss_mib: float
    """Proportional memory of all, without pages of files: pages that several share count once."""
    descriptors: int
    """Open in all."""
    processes: int
    checkpoints_mib: float
    records_mib: float
    """Files of the run that are not checkpoints: events, ledger, configuration."""


MUST_NOT_GROW = ("rss_mib", "pss_mib", "descriptors", "processes", "checkpoints_mib")
GROWS_BY_DESIGN = ("records_mib",)


class Trend(NamedTuple):
    """A straight line through a quantity over time."""

    mean: float
    per_hour: float
    error: float
    """Standard error of `per_hour`."""
    hours: float
    """Between the first and the last sample of the fit."""

    @property
    def grows(self) -> bool:
        """Whether the slope is more than noise, and what it has added worth telling."""
        is_significant = self.per_hour > ERRORS * self.error
        return is_significant and self.per_hour * self.hours > TOLERATED_GROWTH * self.mean


def trend(seconds: Sequence[float], values: Sequence[float]) -> Trend:
    """Least squares through averages of `BLOCKS` blocks of consecutive values, after the warm-up.

    Raises:
        ValueError: too few values for two in each block.
    """
    first = math.ceil(WARM_UP * len(values))
    count = len(values) - first
    if count < 2 * BLOCKS:
        raise ValueError(f"{len(values)} samples, {count} after the warm-up; at least {2 * BLOCKS} are needed")
    edges = [first + count * block // BLOCKS for block in range(BLOCKS + 1)]
    hours = [fmean(seconds[a:b]) / 3600 for a, b in pairwise(edges)]
    means = [fmean(values[a:b]) for a, b in pairwise(edges)]
    middle, mean = fmean(hours), fmean(means)
    squares = sum((x - middle) ** 2 for x in hours)
    slope = sum((x - middle) * (y - mean) for x, y in zip(hours, means, strict=True)) / squares
    residuals = sum((y - mean - slope * (x - middle)) ** 2 for x, y in zip(hours, means, strict=True))
    error = math.sqrt(residuals / (BLOCKS - 2) / squares)
    return Trend(mean, slope, error, (seconds[-1] - seconds[first]) / 3600)


def take_sample(process: psutil.Process, runs: Path, started: float) -> Sample:
    """Look at a running process and its folder of runs, which may not exist yet.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    seconds = time.monotonic() - started
    rss = process.memory_info().rss
    pss = descriptors = processes = 0
    for member in (process, *process.children(recursive=True)):
        # A worker may end between two looks.
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
            pss += _pss_bytes(member.pid)
            descriptors += member.num_fds()
            processes += 1
    step = checkpoints = records = 0
    for path in runs.rglob("*"):
        with suppress(FileNotFoundError):
            size = path.stat().st_blocks * 512 if path.is_file() else 0
            if path.parent.name == "checkpoints":
                checkpoints += size
                if match := re.fullmatch(r"step=(\d+)\.ckpt", path.name):
                    step = max(step, int(match[1]))
            else:
                records += size
    mib = 2**20
    return Sample(
        round(seconds, 2),
        step,
        round(rss / mib, 3),
        round(pss / mib, 3),
        descriptors,
        processes,
        round(checkpoints / mib, 4),
        round(records / mib, 4),
    )


def _pss_bytes(pid: int) -> int:
    """Of memory without a file behind it: pages of libraries count for more when another program stops sharing them."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    if not fields:
        raise FileNotFoundError(pid)  # it has just ended
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Pss_Anon", "Pss_Shmem"))


def watch(command: Sequence[str], folder: Path, *, seconds: float, every: float) -> tuple[list[Sample], int | None]:
    """Run a command in `folder`, look at it until the time is over, and stop it by SIGTERM.

    Returns:
        the samples, also in `folder`/samples.jsonl; the exit code if the command ended by itself, else None.
    """
    runs = folder / "runs"
    started = time.monotonic()
    samples: list[Sample] = []
    with (folder / "output.log").open("w") as log, (folder / "samples.jsonl").open("w") as lines:
        child = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        process = psutil.Process(child.pid)
        try:
            while (elapsed := time.monotonic() - started) < seconds:
                if child.poll() is not None:
                    return samples, child.returncode
                with suppress(psutil.NoSuchProcess):
                    samples.append(take_sample(process, runs, started))
                    lines.write(json.dumps(asdict(samples[-1])) + "\n")
                    lines.flush()
                time.sleep(max(0.0, min(every, seconds - elapsed)))
            return samples, None
        finally:
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    # What it may have left behind.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def training(samples: Sequence[Sample]) -> list[Sample]:
    """Those since the first checkpoint, before which a training only starts; all where nothing was saved."""
    return [sample for sample in samples if sample.step > 0] or list(samples)


def report(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """One line for each quantity, and the names of those that grow and must not."""
    seconds = [sample.seconds for sample in samples]
    lines, growing = [], []
    for name in (*MUST_NOT_GROW, *GROWS_BY_DESIGN):
        found = trend(seconds, [getattr(sample, name) for sample in samples])
        verdict = "grows by design" if name in GROWS_BY_DESIGN else "GROWS" if found.grows else "flat"
        if verdict == "GROWS":
            growing.append(name)
        lines.append(
            f"{name}: mean {found.mean:.2f}, slope {found.per_hour:+.3f} +- {found.error:.3f} an hour, {verdict}"
        )
    return lines, growing


def draw(samples: Sequence[Sample], path: Path) -> None:
    """A panel for each of four quantities over time; what the fit leaves out is grey."""
    from matplotlib.figure import Figure

    panels = {
        "pss_mib": "memory of all processes but files (PSS), MiB",
        "rss_mib": "memory of the training process (RSS), MiB",
        "descriptors": "open descriptors",
        "checkpoints_mib": "checkpoints, MiB",
    }
    minutes = [sample.seconds / 60 for sample in samples]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
        values = [getattr(sample, name) for sample in samples]
        found = trend([sample.seconds for sample in samples], values)
        axis.axvspan(minutes[0], minutes[math.ceil(WARM_UP * len(minutes))], color="0.92", linewidth=0)
        axis.plot(minutes, values, linewidth=0.8)
        axis.set_title(f"{label}\n{found.per_hour:+.2f} ± {found.error:.2f} an hour", fontsize=9)
        axis.set_ylim(0, 1.15 * max(*values, 1e-9))
    for axis in axes[-1]:
        axis.set_xlabel("minutes")
    figure.savefig(path, format="png", dpi=130)


def main(args: Sequence[str] | None = None) -> int:
    """Run, report, draw; returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    flags = args[args.index("--") + 1 :] if "--" in args else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new or empty; runs, data and results go there")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    options = parser.parse_args(args[: len(args) - len(flags) - 1] if "--" in args else args)
    if options.folder.exists() and any(options.folder.iterdir()):
        raise SystemExit(f"{options.folder}: has files in it; give a new or an empty folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    recipe = [f"--config={path}" for path in RECIPES]
    muse = [sys.executable, "-m", "muse_lightning.cli", "fit", *recipe, *FLAGS, *flags]
    samples, exit_code = watch(muse, options.folder.absolute(), seconds=60 * options.minutes, every=options.every)
    if exit_code is not None:
        print(f"{options.folder / 'output.log'}: muse fit ended by itself, exit code {exit_code}")
        return 1
    samples = training(samples)
    lines, growing = report(samples)
    minutes, steps = (samples[-1].seconds - samples[0].seconds) / 60, samples[-1].step - samples[0].step
    print(f"{minutes:.1f} minutes, {steps} steps, {len(samples)} samples")
    print("\n".join(lines))
    draw(samples, options.folder / "soak.png")
    return 1 if growing else 0


if __name__ == "__main__":
    sys.exit(main())
