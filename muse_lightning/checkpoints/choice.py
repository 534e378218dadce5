"""Which checkpoint of a folder is the last, or the best: by manifest and step, never by time; each is read to the end
before it is trusted, and one that is damaged is named and passed over."""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from muse_lightning.checkpoints.manifest import (
    CHECKPOINT_SUFFIX,
    MANIFEST_SUFFIX,
    Manifest,
    manifest_path,
    problem_of,
)

MONITOR = "val/loss"
"""The metric by which `best` is the lowest."""
_NAME = re.compile(r"step=(\d+)")


def step_path(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step={step}{CHECKPOINT_SUFFIX}"


def stored(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints of a folder, or what is left of them, with their steps (`step_of`), the newest first."""
    names = {path.name.removesuffix(CHECKPOINT_SUFFIX) for path in folder.glob(f"*{CHECKPOINT_SUFFIX}")}
    names |= {path.name.removesuffix(MANIFEST_SUFFIX) for path in folder.glob(f"*{MANIFEST_SUFFIX}")}
    paths = [folder / f"{name}{CHECKPOINT_SUFFIX}" for name in names]
    return sorted(((step_of(path), path) for path in paths), reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint: its manifest's, or, without one, its name's; -1 if neither says it."""
    match = _NAME.search(path.name)
    try:
        return Manifest.read(path).step
    except (OSError, ValueError):
        return int(match[1]) if match else -1


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a checkpoint that seems whole."""
    return any(folder.glob(f"*{MANIFEST_SUFFIX}"))


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None if nothing is, or if it has none."""
    return problem_of(path) if manifest_path(path).exists() else None


def report(line: str) -> None:
    """Where the lines go that name a damaged checkpoint."""
    print(line, file=sys.stderr, flush=True)


def last_checkpoint(folder: Path, say: Callable[[str], None] = report) -> Path | None:
    """The checkpoint of the highest step that is whole; None where there is none.

    Args:
        folder: `checkpoints` of a run.
        say: told, in one line each, which newer ones are damaged.
    """
    return _first_whole((path for _, path in stored(folder)), say)


def best_checkpoint(folder: Path, say: Callable[[str], None] = report) -> Path | None:
    """The checkpoint with the lowest `MONITOR` that is whole; None where none was measured."""
    return _first_whole(by_metric(folder), say)


def by_metric(folder: Path) -> list[Path]:
    """Checkpoints that were measured, the best first; of equal ones the newer."""
    measured = []
    for step, path in stored(folder):
        try:
            loss = loss_of(Manifest.read(path))
        except (OSError, ValueError):
            continue
        if loss is not None:
            measured.append((loss, -step, path))
    return [path for _, _, path in sorted(measured)]


def loss_of(manifest: Manifest) -> float | None:
    """What `MONITOR` was; None if it was not measured, or was not a number, which is neither lower nor higher."""
    value = manifest.metrics.get(MONITOR)
    return value if value is not None and value == value else None


def _first_whole(paths: Iterable[Path], say: Callable[[str], None]) -> Path | None:
    for path in paths:
        problem = problem_of(path)
        if problem is None:
            return path
        say(f"checkpoint {path} is not used: {problem}")
    return None
