"""All faults of a scene, one run each."""

import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.sweep.runs import (
    DAMAGES,
    KILL,
    NO_FAULT,
    Fault,
    Result,
    Scene,
    faults_at,
    problems,
    problems_of_damage,
    run,
)
from tests.faults.sweep.tracing import Call

ATTEMPTS = 3
"""How often a fault is tried whose call is another one this time."""


@dataclass(frozen=True)
class Outcome:
    """One injection."""

    scene: str
    call: str
    """The system call; "damage" where a file was changed after the training; empty without a fault."""
    file: str
    fault: str
    """KILL, an error, or what the file became."""
    confirmed: int
    """Saves that were said to be on the disk."""
    whole: int
    """Checkpoints on the disk that are whole."""
    problems: tuple[str, ...]
    """What does not hold of what is promised."""


def sweep(
    scene: Scene, *, with_reads: bool = True, kinds: Collection[str] = (), files: str = "", with_damage: bool = True
) -> Iterator[Outcome]:
    """One run without a fault, one for each fault of each system call that it has made in its folder, and one for each
    damage that the newest checkpoint may take when all is over.

    Args:
        with_reads: whether calls that only read fail too.
        kinds: the faults; none: all.
        files: a pattern that is searched in the name of the file; "": every file.
    """
    with tempfile.TemporaryDirectory(dir=scene.mount) as folder:
        root = Path(folder).resolve()
        plain = run(root, scene)
        yield _outcome(scene, None, plain, problems(root, scene, None, plain))
        if with_damage and plain.exit_code == 0:
            yield from _damages(root, scene)
        for call in plain.calls:
            if not call.within(root) or not re.search(files, file_of(call)):
                continue
            for kind in faults_at(call, with_reads):
                # In a scene that cannot rename that fails without a fault.
                is_there = not scene.can_rename and call.name.startswith("rename") and kind != KILL
                if is_there or (kinds and kind not in kinds):
                    continue
                fault = Fault(call, kind)
                for _ in range(ATTEMPTS):
                    result = run(root, scene, fault)
                    broken = problems(root, scene, fault, result)
                    if not any(line.startswith(NO_FAULT) for line in broken):
                        break
                yield _outcome(scene, fault, result, broken)


def file_of(call: Call) -> str:
    """The name of the last file that it is about, without what is random in it."""
    return Path(call.paths[-1]).name.split(".partial")[0]


def _outcome(scene: Scene, fault: Fault | None, result: Result, broken: list[str]) -> Outcome:
    counts = len(result.confirmed), len(result.found.whole)
    if fault is None:
        return Outcome(scene.name, "", "", "", *counts, tuple(broken))
    name = f"{fault.call.name} to write" if fault.call.creates else fault.call.name
    return Outcome(scene.name, name, file_of(fault.call), fault.kind, *counts, tuple(broken))


def _damages(root: Path, scene: Scene) -> Iterator[Outcome]:
    run(root, scene)
    kept = root / "kept"
    shutil.copytree(root / "run", kept)
    for suffix in (".ckpt", ".manifest.json"):
        for name, damage in DAMAGES.items():
            shutil.rmtree(root / "run")
            shutil.copytree(kept, root / "run")
            broken = problems_of_damage(root, scene, suffix, damage)
            yield Outcome(scene.name, "damage", f"newest{suffix}", name, 4, 3, tuple(broken))
