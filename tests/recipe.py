"""A recipe small enough to train in a test, on repositories made for it, and `muse` called with it in this process."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

import muse_lightning.cli
from muse_lightning.cli import main

RECIPE = """
run: {root: runs, name: tiny}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 2
  log_every_n_steps: 1
  enable_model_summary: false
model:
  config:
    vocab_size: 320
    hidden_size: 16
    intermediate_size: 32
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    max_position_embeddings: 64
  attention:
    class_path: Muse
    init_args: {chunk: 16, query_cluster: 4, key_cluster: 4, top_k: 1, exact_below: 16}
  warmup_steps: 0
  loss_chunk: 32
data:
  dataset: dataset
  sources: [{class_path: Folders, init_args: {path: source}}]
  seq_len: 32
  batch_size: 2
  val_fraction: 0.3
  test_fraction: 0.3
"""


def write_recipe(folder: Path) -> None:
    """Write `recipe.yaml` and the repositories it is about."""
    (folder / "recipe.yaml").write_text(RECIPE)
    for name in ("one", "two", "three", "four"):
        repository = folder / "source" / name
        repository.mkdir(parents=True)
        for number in range(3):
            text = "".join(f"{name}_{number}_{line} = {line * number}\n" for line in range(20))
            (repository / f"module_{number}.py").write_text(text)


class Muse:
    """`muse` in a working directory with `recipe.yaml` and the repositories it is about."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        write_recipe(folder)

    def __call__(self, *args: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        self._capsys.readouterr()
        code = main(args)
        out, err = self._capsys.readouterr()
        return code, out, err

    def with_recipe(self, verb: str, *args: str) -> tuple[int, str, str]:
        """A command on the recipe."""
        return self(verb, "--config", "recipe.yaml", *args)

    def error(self, *args: str) -> str:
        """The one line on standard error of a command that must end as a user's mistake and change no file."""
        before = self._contents()
        code, _, err = self(*args)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) == (2, 1), err
        assert "Traceback" not in err
        assert self._contents() == before
        return lines[0].removeprefix("error: ")

    def _contents(self) -> dict[Path, bytes | None]:
        """Everything in the working directory."""
        return {path: path.read_bytes() if path.is_file() else None for path in self.folder.rglob("*")}

    def versions(self) -> Sequence[str]:
        """Run folders that exist."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob("runs/*/*"))


class Started:
    """A program, with what a test asks of a forked process."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        program = [sys.executable, muse_lightning.cli.__file__, *command]
        with log.open("w") as file:
            self._process = subprocess.Popen(program, stdout=file, stderr=file, start_new_session=True)
        self.pid = self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()


def start(command: Sequence[str], log: Path) -> ForkProcess | Started:
    """Start `muse` as a process and group of its own that writes to a file. A fork: importing everything again would
    take most of a test's time. Not of several ranks, which must be one program: the first would parse a flag of
    `int | float` by what other tests have imported, `--trainer.limit_val_batches=1` as all batches, and wait for the
    second, which takes one."""
    if "--trainer.devices=2" in command:
        return Started(command, log)
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(list(command), log))
    process.start()
    return process


def _alone(command: list[str], log: Path) -> None:
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # pytest's capture put others in their place.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    # What Lightning would start as the second rank is this program.
    sys.argv = [muse_lightning.cli.__file__, *command]
    sys.exit(main())
