"""One training with one fault, and what is wrong afterwards."""

import functools
import mmap
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch

from muse_lightning.checkpoints import choice
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.errors import StorageError
from tests.faults.sweep.disk import power_cuts, promised
from tests.faults.sweep.reader import Found, read
from tests.faults.sweep.tracing import FOLDERS, OPENS, RENAMES, SYNCS, WRITES, Call, Tracer
from tests.faults.sweep.training import RESUMED_STEPS, STEPS, train

KILL = "KILL"
NO_FAULT = "the fault did not happen"
"""What is wrong if a run made other calls than the one before."""
LONGEST_S = 60
"""A training that takes longer hangs."""
NO_RENAME = tuple(f"{name}:error=EXDEV" for name in RENAMES if name.startswith("rename"))
"""Storage that cannot rename."""
_ALLOW_ANY_TRACER = 0x59616D61, -1
_FAILED, _STORAGE = 4, 77


@dataclass(frozen=True)
class Scene:
    """Where a training runs and how."""

    mount: Path
    """A folder there gets the checkpoints."""
    is_asynchronous: bool
    can_rename: bool = True
    mutant: Callable[[], None] | None = None
    """Called in the process of the training before it starts: breaks our code."""

    @property
    def injections(self) -> tuple[str, ...]:
        return () if self.can_rename else tuple(f"?{injection}" for injection in NO_RENAME)

    @property
    def name(self) -> str:
        return f"{self.mount}, {'async' if self.is_asynchronous else 'sync'}{'' if self.can_rename else ', no rename'}"


@dataclass(frozen=True)
class Fault:
    """What happens to one call of a training: KILL, or an error."""

    call: Call
    kind: str

    @property
    def injection(self) -> str:
        what = f"signal={self.kind}" if self.kind == KILL else f"error={self.kind}"
        return f"{self.call.name}:{what}:when={self.call.number}"


@dataclass(frozen=True)
class Result:
    """A training that has ended."""

    exit_code: int
    """Of the process; negative: the signal that ended it."""
    confirmed: tuple[int, ...]
    said: str
    calls: tuple[Call, ...]
    found: Found


def faults_at(call: Call, with_reads: bool = True) -> list[str]:
    """The faults of a call: a kill where it changes something, and errors that Linux documents for it."""
    if call.name in RENAMES:
        return [KILL, "ENOSPC", "EIO", "EXDEV"]
    if call.name in WRITES or (call.name in OPENS and call.creates):
        return [KILL, "ENOSPC", "EIO", "EROFS" if call.name in OPENS else "EDQUOT"]
    if call.name in SYNCS:
        return [KILL, "ENOSPC", "EIO", "EDQUOT"]
    if call.name in FOLDERS:
        return [KILL, "ENOSPC", "EIO", "EROFS"]
    if call.changes:
        return [KILL, "EROFS", "EIO", "EACCES"]
    if call.name in OPENS:
        return ["EIO", "EMFILE"] if with_reads else []
    by_name = call.name.endswith("stat") and "AT_EMPTY_PATH" not in call.flags
    return ["EIO"] if with_reads and (by_name or call.name in ("read", "getdents64", "close")) else []


def run(root: Path, scene: Scene, fault: Fault | None = None) -> Result:
    """Train in a new process below `root`, which is emptied, with one fault or none."""
    _import_what_saving_imports()
    shutil.rmtree(root / "run", ignore_errors=True)
    confirmed = mmap.mmap(-1, RESUMED_STEPS + 1)
    ready, said_ready = os.pipe()
    may_go, go = os.pipe()
    child = os.fork()
    if child == 0:
        io = DurableCheckpointIO(scene.is_asynchronous)
        io.submit(lambda: _announce(said_ready))
        io.wait()
        os.read(may_go, 1)
        _train(root, scene, io, confirmed, STEPS)
    thread = int(os.read(ready, 20))
    injections = scene.injections if fault is None else (*scene.injections, fault.injection)
    if fault is not None and fault.call.name.startswith("rename"):
        # Of two injections into one call, strace takes the last.
        injections = (*(each for each in injections if not each.startswith(f"?{fault.call.name}:")), fault.injection)
    try:
        tracer = Tracer(thread, root / "calls", injections)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        for descriptor in (ready, said_ready, may_go):
            os.close(descriptor)
    os.write(go, b"x")
    os.close(go)
    exit_code = _wait(child)
    calls = tuple(tracer.finish())
    return Result(exit_code, _steps(confirmed), (root / "said").read_text(), calls, read(root / "run" / "checkpoints"))


@functools.cache
def _import_what_saving_imports() -> None:
    torch.save({}, BytesIO())


def resume(root: Path, scene: Scene) -> Result:
    """Go on with what is there, in a new process, as --resume does."""
    confirmed = mmap.mmap(-1, RESUMED_STEPS + 1)
    child = os.fork()
    if child == 0:
        _train(root, scene, DurableCheckpointIO(scene.is_asynchronous), confirmed, RESUMED_STEPS)
    exit_code = _wait(child)
    return Result(exit_code, _steps(confirmed), (root / "said").read_text(), (), read(root / "run" / "checkpoints"))


def _announce(descriptor: int) -> None:
    os.write(descriptor, str(threading.get_native_id()).encode())


def _train(root: Path, scene: Scene, io: DurableCheckpointIO, confirmed: mmap.mmap, max_steps: int) -> None:
    """In the new process; never returns."""
    exit_code = _FAILED
    try:
        output = os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # pytest has put something else in their place.
        sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        if scene.mutant is not None:
            scene.mutant()
        folder = root / "run" / "checkpoints"
        found = choice.last_checkpoint(folder) if max_steps == RESUMED_STEPS else None
        train(folder, io, confirmed, max_steps, found)
        exit_code = 0
    except StorageError:
        exit_code = _STORAGE
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(exit_code)


def _wait(child: int) -> int:
    deadline = time.monotonic() + LONGEST_S
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM
        time.sleep(0.002)


def _steps(confirmed: mmap.mmap) -> tuple[int, ...]:
    return tuple(step for step in range(len(confirmed)) if confirmed[step])


def problems(root: Path, scene: Scene, fault: Fault | None, result: Result) -> list[str]:
    """What is wrong after a run: nothing, if all that is promised holds. Goes on with the training, to see that."""
    folder = root / "run" / "checkpoints"
    if fault is not None and not _has_happened(fault, result):
        return [f"{NO_FAULT}: {fault.injection}, exit code {result.exit_code}: {result.said[-2000:]}"]
    copies = not scene.can_rename or (fault is not None and fault.kind == "EXDEV")
    unmeasured = set(map(int, re.findall(r"step=(\d+)\.ckpt does not say", result.said)))
    best = not unmeasured
    broken = _broken_promises(result, best, copies and fault is not None and fault.kind == KILL)
    chosen = choice.last_checkpoint(folder, say=lambda line: None)
    newest = max(result.found.whole, default=None)
    if (chosen and int(chosen.stem.removeprefix("step="))) != newest:
        broken.append(f"the last checkpoint is said to be {chosen}, it is of step {newest}")
    if fault is None or fault.kind != KILL:
        broken += _broken_at_the_end(result)
        # Where nothing can be renamed, what is claimed holds for one fault.
        if scene.can_rename or fault is None:
            broken += power_cuts(result.calls, folder, best, copies)
    if result.exit_code != 0 or result.found.leftovers or result.found.orphans:
        broken += _broken_after_resume(resume(root, scene))
    return broken


def _has_happened(fault: Fault, result: Result) -> bool:
    if fault.kind == KILL:
        return result.exit_code == -signal.SIGKILL and bool(result.calls) and _same(result.calls[-1], fault.call)
    return any(call.was_injected and call.error == fault.kind and _same(call, fault.call) for call in result.calls)


def _same(one: Call, other: Call) -> bool:
    return (one.name, one.number, _stems(one.paths)) == (other.name, other.number, _stems(other.paths))


def _stems(paths: Iterable[str]) -> list[str]:
    return [re.sub(r"partial-\w+", "partial", path) for path in paths]


def _broken_promises(result: Result, best: bool, copies: bool) -> list[str]:
    wanted = promised(result.confirmed, best and not copies)
    missing = wanted - result.found.whole
    if copies and (len(missing) < len(wanted) or len(wanted) < 2):
        missing = set()
    broken = [f"confirmed step {step} is lost" for step in sorted(missing)]
    return broken + [f"step {step} has a manifest and {why}" for step, why in result.found.false.items()]


def _broken_at_the_end(result: Result) -> list[str]:
    broken = []
    if result.exit_code != 0:
        broken.append(f"the training ended with {result.exit_code}: {result.said[-1000:]}")
    if STEPS not in result.found.whole:
        broken.append("the last step is not there")
    if len(result.found.whole) < 2:
        broken.append(f"fewer than two checkpoints: {result.found.whole}")
    unsaved = set(map(int, re.findall(r"step=(\d+)\.ckpt was not saved", result.said)))
    for step in range(1, STEPS + 1):
        if step not in result.confirmed and step not in unsaved:
            broken.append(f"step {step} was not saved, and no line says so")
        if step in result.confirmed and step in unsaved and step != STEPS:
            broken.append(f"step {step} was saved, and a line says that it was not")
    return broken


def _broken_after_resume(result: Result) -> list[str]:
    found = result.found
    broken = [f"resumed: step {step} has a manifest and {why}" for step, why in found.false.items()]
    if result.exit_code != 0:
        broken.append(f"resumed: the training ended with {result.exit_code}: {result.said[-1000:]}")
    if not {RESUMED_STEPS - 1, RESUMED_STEPS} <= found.whole:
        broken.append(f"resumed: the newest two are not there: {found.whole}")
    if found.leftovers or found.orphans:
        broken.append(f"resumed: left over: {found.leftovers}, without manifest: {found.orphans}")
    if len(found.whole) > 3:
        broken.append(f"resumed: more than the newest two and the best: {found.whole}")
    return broken


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def problems_of_damage(root: Path, scene: Scene, suffix: str, damage: Callable[[bytes], bytes | None]) -> list[str]:
    """Damage the newest checkpoint of a training that has ended, and go on: from the one before, and a line says so."""
    path = root / "run" / "checkpoints" / f"step={STEPS}{suffix}"
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    result = resume(root, scene)
    is_said = f"step={STEPS}.ckpt is not used" in result.said
    return [*([] if is_said else ["a damaged checkpoint was used"]), *_broken_after_resume(result)]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    **{
        f"bit flipped at {part}/8": lambda content, part=part: _flipped(content, len(content) * part // 8)
        for part in range(8)
    },
    "cut to half": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "removed": lambda content: None,
}
"""What a file of a checkpoint may become; None: nothing."""
