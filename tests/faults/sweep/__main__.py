"""Every system call of the saves of a training, killed and failed in turn: nothing that was confirmed may be lost.

Usage: python -m tests.faults.sweep [--mount PATH ...] [--modes sync,async] [--workers N] [--out FILE.jsonl]
       python -m tests.faults.sweep --mutants

Exit code 1 if something is lost, or if a mutant is not found.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.faults.sweep.mutants import MUTANTS, verdict
from tests.faults.sweep.runs import KILL, Scene
from tests.faults.sweep.sweeping import Outcome, sweep
from tests.faults.sweep.tracing import why_not


def main() -> int:
    """Print a table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mount", type=Path, action="append", help="default: TMPDIR, and /dev/shm")
    parser.add_argument("--modes", default="sync,async")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="JSON lines: each kind of injection, its result, how many")
    parser.add_argument("--mutants", action="store_true", help="break our own code instead, and find it")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"python -m tests.faults.sweep: {reason}", file=sys.stderr)
        return 2
    if options.mutants:
        return _mutants()
    mounts = options.mount or [Path(tempfile.gettempdir()), Path("/dev/shm")]
    modes = options.modes.split(",")
    scenes = [Scene(mount, mode == "async") for mode in modes for mount in mounts]
    scenes.append(Scene(mounts[0], modes[-1] == "async", can_rename=False))
    started = time.monotonic()
    with ProcessPoolExecutor(options.workers) as pool:
        # Reading is the same code in every scene.
        found = pool.map(_swept, scenes, [scene == scenes[0] for scene in scenes])
        outcomes = [outcome for outcomes in found for outcome in outcomes]
    if options.out is not None:
        options.out.write_text("".join(f"{line}\n" for line in lines(outcomes)))
    return _report(outcomes, time.monotonic() - started)


def lines(outcomes: Iterable[Outcome]) -> list[str]:
    """A JSON line for each kind of injection with its result, and how many there were."""
    counts = Counter((each.scene, each.call, each.file, each.fault, each.problems) for each in outcomes)
    names = ("scene", "call", "file", "fault", "problems")
    return [json.dumps(dict(zip(names, kind, strict=True)) | {"runs": count}) for kind, count in counts.items()]


def _swept(scene: Scene, with_reads: bool) -> list[Outcome]:
    kinds = () if scene.can_rename else (KILL, "ENOSPC")
    outcomes = list(sweep(scene, with_reads=with_reads, with_damage=with_reads, kinds=kinds))
    print(f"{scene.name}: {len(outcomes)} runs", file=sys.stderr, flush=True)
    return outcomes


def _report(outcomes: Iterable[Outcome], seconds: float) -> int:
    injected = [outcome for outcome in outcomes if outcome.call]
    kills = Counter(outcome.call for outcome in injected if outcome.fault == KILL)
    lost = Counter(outcome.call for outcome in injected if any("lost" in line for line in outcome.problems))
    others = Counter(outcome.call for outcome in injected if outcome.problems)
    print("| system call | kills | errors | checkpoints lost | anything else |\n| --- | --- | --- | --- | --- |")
    for name, count in sorted(Counter(outcome.call for outcome in injected).items()):
        print(f"| {name} | {kills[name]} | {count - kills[name]} | {lost[name]} | {others[name] - lost[name]} |")
    scenes = {outcome.scene for outcome in outcomes}
    print(
        f"{len(injected)} injections in {len(scenes)} scenes, {seconds:.0f} s: {sum(lost.values())} lost a checkpoint, "
        f"{sum(others.values()) - sum(lost.values())} broke something else"
    )
    broken = [outcome for outcome in outcomes if outcome.problems]
    for outcome in broken[:20]:
        print(f"{outcome.scene}: {outcome.call} {outcome.file} {outcome.fault}: {'; '.join(outcome.problems)}")
    return 1 if broken else 0


def _mutants() -> int:
    print("| mutant | what it breaks | found by | as |\n| --- | --- | --- | --- |")
    survivors = 0
    for name, mutant in MUTANTS.items():
        found = verdict(name)
        survivors += found is None
        by = "**not found**" if found is None else f"{found.call} {found.fault}".strip() or "no fault at all"
        what = "" if found is None else found.problems[0].split(" (")[0]
        print(f"| {name} | {(mutant.__doc__ or '').strip()} | {by} | {what} |", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
