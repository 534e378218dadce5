"""Command lines of `muse fit`, `prepare` and `info` fuzzed in this process, up to where something would be built.

    python -m tests.fuzz.recipes --parses 100000 --seed 0 --findings FOLDER

Accepted, or refused in one line: anything else is a finding, as are a parse of more than 5 s, a file written, a module
of the working directory imported, and an accepted configuration whose saved form is not read back as an equal one.
"""

import argparse
import contextlib
import gc
import io
import logging
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from jsonargparse import _core, _subcommands

from muse_lightning.configuration.allow_list import only_allowed_modules
from muse_lightning.configuration.check import UNREADABLE
from muse_lightning.configuration.packaged import resolve_arguments
from muse_lightning.configuration.redact import REDACTED
from muse_lightning.errors import UserError, one_line
from muse_lightning.recipe_cli import MuseCLI
from tests.fuzz.recipe_cases import Case, Grammar

LONGEST_S = 5.0
"""Of processor time: others may use the machine. What waits, for a pipe for example, has `LONGEST_WAIT_S`."""
LONGEST_WAIT_S = 300.0
LONGEST_LINE = 2000
MORE_MEMORY_BYTES = 2 << 30
BUILDS = {"fit": "trainer", "prepare": "data", "info": "model"}
MINIMAL = {
    "fit": (
        "--model.config=presets/75m.yaml",
        "--data.seq_len=8",
        "--data.batch_size=1",
        "--data.dataset=d",
        "--trainer.max_steps=1",
    ),
}


class Hang(BaseException):
    """A parse that took too long. No library catches it as an error of its own."""


class FindingError(Exception):
    """What must not happen."""


class Parsing(MuseCLI):
    """A command line up to the point where objects would be built."""

    def instantiate_classes(self) -> None:
        """Nothing is."""


class Target:
    """The parsers of the verbs, built once, and the working directory that they read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "part.yaml").write_text("class_path: Muse\ninit_args: {top_k: 3}\n")
        (folder / "broken.yaml").write_text("a: [")
        (folder / "self.yaml").write_text("config: self.yaml\nmodel: self.yaml\n")
        (folder / "bin.yaml").write_bytes(bytes(range(256)))
        (folder / "folder").mkdir()
        (folder / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Evil: ...\n")
        self.present = set(os.listdir(folder))
        self.parsers = {verb: Parsing(verb, "", MINIMAL["fit"], [], builds=kind) for verb, kind in BUILDS.items()}

    def keys(self) -> list[str]:
        """Whole keys that the parser of `fit` knows."""
        dests = {action.dest for action in self.parsers["fit"].parser._actions}
        return sorted(dest for dest in dests if dest not in ("help", "config", "print_config"))

    def run(self, case: Case) -> str:
        """What became of a command line: "accepted", "refused" or "ended", after the help of a class.

        Raises:
            FindingError: something else.
        """
        case.write(self.folder)
        try:
            outcome = self._parse(case)
        finally:
            for name in case.files:
                (self.folder / name).unlink()
            written = set(os.listdir(self.folder)) - self.present
        if "evil" in sys.modules or "ran" in written:
            raise FindingError("code of the working directory has run")
        if written:
            raise FindingError(f"written: {written}")
        return outcome

    def _parse(self, case: Case) -> str:
        cli = self.parsers[case.verb]
        try:
            with _limited():
                cli.checkpoint = None
                args = ["--resume=true" if arg == "--resume" else arg for arg in resolve_arguments(case.args)]
                cli.parse_arguments(cli.parser, args)
                cli._set_seed()
                self._check_round_trip(cli)
        except UserError as error:
            line = one_line(str(error))
            if len(line) > LONGEST_LINE:
                raise FindingError(f"a line of {len(line):,} characters") from error
            if line.startswith(UNREADABLE):
                raise FindingError("refused, but not explained") from error
            return "refused"
        except SystemExit as error:
            if error.code not in (0, None):
                raise FindingError(f"exit code {error.code}") from error
            return "ended"
        except Hang as error:
            raise FindingError(f"more than {LONGEST_S} s") from error
        return "accepted"

    def _check_round_trip(self, cli: Parsing) -> None:
        """The configuration that a run keeps is read as an equal one, and kept as the same text again."""
        kept = cli._config_text()
        config = cli.config.clone()
        config.run.version, config.resume, config.ckpt_path = None, False, None
        if REDACTED in kept:
            return
        saved = self.folder / "saved.yaml"
        saved.write_text(kept, encoding="utf-8")
        try:
            cli.parse_arguments(cli.parser, ["--config=saved.yaml"])
        except UserError as error:
            raise FindingError(f"saved configuration refused: {error}") from error
        finally:
            saved.unlink()
        if not _equal(_values(config), _values(cli.config)):
            raise FindingError("saved configuration read otherwise")


def _values(config: Any) -> Any:
    values = config.clone(with_meta=False).as_dict()
    values.pop("config", None)
    return values


def _equal(a: Any, b: Any) -> bool:
    """Equality in which NaN equals itself, and a type counts."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and bool(a == b)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, LONGEST_S), signal.SIGALRM: (signal.ITIMER_REAL, LONGEST_WAIT_S)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextlib.contextmanager
def _remembered_actions() -> Iterator[None]:
    """jsonargparse goes through its whole list of actions for each key, which is a third of a parse: look once."""
    found: dict[Any, tuple[Any, dict[str, Any]]] = {}

    def find(parser: Any, dest: str, exclude: Any = None) -> Any:
        key = (id(parser), len(parser._actions), exclude)
        if len(found) > 500:
            found.clear()
        _, by_name = found.setdefault(key, (parser, {}))
        if dest not in by_name:
            by_name[dest] = look(parser, dest, exclude)
        return by_name[dest]

    look = _subcommands.find_action_and_subcommand
    with (
        mock.patch.object(_core, "find_action_and_subcommand", find),
        mock.patch.object(_subcommands, "find_action_and_subcommand", find),
    ):
        yield


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """A target in a working directory of its own, under the limits of the command line."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            with only_allowed_modules(()), _remembered_actions():
                yield Target(Path(name))
        finally:
            os.chdir(before)


def signature(error: BaseException) -> str:
    """What tells findings apart: the kind of the error, and where it was raised."""
    root = error.__cause__ if isinstance(error, FindingError) and error.__cause__ is not None else error
    frames = [frame for frame in traceback.extract_tb(root.__traceback__) if frame.name != "stop"]
    ours = [f"{Path(frame.filename).name}:{frame.name}" for frame in frames if "site-packages" not in frame.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""
    text = str(error)[:60] if isinstance(error, FindingError) else ""
    return " ".join([type(error).__name__, text, ours[-1] if ours else "", last])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; its exit code is 1 when there was a finding."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    options.add_argument("--parses", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--findings", type=Path, default=None, help="Folder for the inputs of findings.")
    given = options.parse_args(arguments)
    findings: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    warnings.simplefilter("ignore")
    with target() as under_test:
        grammar = Grammar(given.seed, under_test.keys())
        # Thousands of parsers and classes stay; going through them again and again takes a third of the time.
        gc.collect()
        gc.freeze()
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MORE_MEMORY_BYTES,) * 2)
        started = time.monotonic()
        for number in range(1, given.parses + 1):
            case = grammar.case()
            try:
                outcomes[under_test.run(case)] += 1
            except Exception as error:
                outcomes["finding"] += 1
                found = signature(error)
                findings[found] += 1
                if findings[found] == 1:
                    print(f"FINDING {number} {found}\n{_tail(error)}\n{case.to_json()[:1500]}", flush=True)
                    if given.findings:
                        given.findings.mkdir(parents=True, exist_ok=True)
                        (given.findings / f"{len(findings)}.json").write_text(case.to_json())
            if number % 2000 == 0 or number == given.parses:
                rate = number / (time.monotonic() - started)
                print(
                    f"{number:,} parses, {rate:.0f}/s: {dict(outcomes)}, {len(findings)} kinds of finding", flush=True
                )
    for found, count in findings.most_common():
        print(f"{count:6} {found}")
    return 1 if findings else 0


def _tail(error: BaseException) -> str:
    lines = traceback.format_exception(error.__cause__ or error)
    return "".join(lines[-8:])[-2500:]


def _data_bytes() -> int:
    """Memory of this process that RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
