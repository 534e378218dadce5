"""What is surely on the disk after each system call: a power cut, which no kill can stand for, loses what was not
flushed.

The model is that of POSIX and no file system's: what was written to a file is there once an fsync of it has succeeded;
that a name was made, replaced or removed, once an fsync of its folder has; until then, each name alone may be as
before or as after. An fsync that fails flushes nothing, and none after it makes up for that.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.sweep.tracing import FOLDERS, OPENS, REMOVALS, RENAMES, SYNCS, WRITES, Call
from tests.faults.sweep.training import BEST, CONFIRMED, STEPS


@dataclass
class File:
    """A file whatever it is called."""

    is_flushed: bool = False
    is_lost: bool = False
    """A flush has failed: what was written before is nowhere."""


class Disk:
    """A folder that calls change; it does not exist when they begin."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.confirmed: list[int] = []
        self._names: dict[str, File | None] = {}
        # By name, everything that a power cut may leave there: the last element is what the system shows.
        self._after_cut: dict[str, list[File | None]] = {}
        self._parents_to_flush: set[str] = set()

    def apply(self, call: Call) -> None:
        """Do what a call has done."""
        if call.name in SYNCS and call.error and (file := self._names.get(call.paths[0])) is not None:
            file.is_lost = True
        if call.paths and call.paths[0].startswith(CONFIRMED):
            self.confirmed.append(int(call.paths[0].removeprefix(CONFIRMED)))
        if call.error or not call.paths:
            return
        own = [path for path in call.paths if path.startswith(f"{self.folder}/")]
        if call.name in FOLDERS and (self.folder + "/").startswith(f"{call.paths[-1]}/"):
            self._parents_to_flush.add(str(Path(call.paths[-1]).parent))
        elif call.name in SYNCS:
            self._flush(call.paths[0])
        elif call.name in OPENS and call.creates and own:
            if self._names.get(own[0]) is None:
                self._set(own[0], File())
            elif "O_TRUNC" in call.flags:
                self._written(own[0])
        elif call.name in WRITES and own:
            self._written(own[0])
        elif call.name in RENAMES and own:
            self._set(own[-1], self._names.get(own[0]) if len(own) == 2 else File())
            if len(own) == 2:
                self._set(own[0], None)
        elif call.name in REMOVALS and own:
            self._set(own[0], None)

    def _set(self, name: str, file: File | None) -> None:
        self._after_cut.setdefault(name, [self._names.get(name)]).append(file)
        self._names[name] = file

    def _written(self, name: str) -> None:
        if (file := self._names.get(name)) is not None:
            file.is_flushed = False

    def _flush(self, path: str) -> None:
        self._parents_to_flush.discard(path)
        if path == self.folder:
            self._after_cut.clear()
        elif (file := self._names.get(path)) is not None:
            file.is_flushed = True

    def _possible(self, name: str) -> list[File | None]:
        return self._after_cut.get(name, [self._names.get(name)])

    def surely_whole(self) -> set[int]:
        """Steps whose checkpoint and manifest are there whatever a power cut does now."""
        if self._parents_to_flush:
            return set()
        return {step for step in range(1, STEPS + 1) if all(map(_is_whole, self._data(step) + self._manifests(step)))}

    def perhaps_false(self) -> set[int]:
        """Steps of which a power cut may leave a manifest without what it speaks of."""
        return {
            step
            for step in range(1, STEPS + 1)
            if any(map(_is_whole, self._manifests(step))) and not all(map(_is_whole, self._data(step)))
        }

    def _data(self, step: int) -> list[File | None]:
        return self._possible(f"{self.folder}/step={step}.ckpt")

    def _manifests(self, step: int) -> list[File | None]:
        return self._possible(f"{self.folder}/step={step}.manifest.json")


def _is_whole(file: File | None) -> bool:
    return file is not None and file.is_flushed and not file.is_lost


def promised(confirmed: Iterable[int], best: bool = True) -> set[int]:
    """Steps that must be there: the newest two that were confirmed, and the one that measured best."""
    steps = sorted(set(confirmed))
    return set(steps[-2:]) | ({BEST} & set(steps) if best else set())


def power_cuts(calls: Iterable[Call], folder: Path, best: bool = True, copies: bool = False) -> Iterator[str]:
    """What a power cut after any of the calls of a training may break of what is promised, each once.

    Args:
        best: whether the best checkpoint is known to be it.
        copies: whether the storage could not rename: then one of the newest two is promised, once there are two.
    """
    disk = Disk(folder)
    seen = set()
    for call in calls:
        disk.apply(call)
        wanted = promised(disk.confirmed, best and not copies)
        missing = wanted - disk.surely_whole()
        if copies and (len(missing) < len(wanted) or len(wanted) < 2):
            missing = set()
        broken = [f"after a power cut, confirmed step {step} may be lost" for step in sorted(missing)]
        broken += [
            f"after a power cut, step {step} may have a manifest and no data" for step in sorted(disk.perhaps_false())
        ]
        for line in broken:
            if line not in seen:
                seen.add(line)
                yield f"{line} (at {call.name} {Path(call.paths[-1]).name if call.paths else ''})"
