"""Many commands on the GPUs of one machine: one to a GPU, each as soon as what it needs is done.

Usage: python tools/run_jobs.py JOBS.yaml FOLDER [--seconds S] [--devices 0 1] [--only NAME...] [--list]

JOBS.yaml has `variables`, texts that are put in place of {{name}}, in each other as well, and `jobs`, the most
important first:

    jobs:
      - name: dense                   # FOLDER/dense.log has its output; FOLDER/dense.done is there once it has ended
        command: muse fit ...         # for bash, in the working directory
        needs: [prepare]              # jobs above that must be done
        seconds: 300                  # it is not begun when less is left of --seconds
        device: false                 # beside the others, without a GPU; true, the default: with one for itself

A job is not run again while its command, and those of what it needs, are as they were. After --seconds, or when this
gets SIGTERM, what still runs is told to end (SIGTERM), and has 30 seconds for it. Exit code 0 if all is done, 1 if
something failed, was ended or was not reached, 2 for a mistake.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

GRACE_SECONDS = 30.0
"""Between SIGTERM and SIGKILL."""
_VARIABLE = re.compile(r"{{ *(\w+) *}}")
ACCEPTED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "name": (str, "a text without /"),
    "command": (str, "a text"),
    "needs": (list, "a list of names"),
    "seconds": ((int, float), "a number"),
    "device": (bool, "true or false"),
}
"""What a job may have in the file."""


@dataclass(frozen=True)
class Job:
    """One command, as above."""

    name: str
    command: str
    needs: tuple[str, ...] = ()
    seconds: float = 0.0
    device: bool = True


@dataclass
class Running:
    """The process of a job, its GPU (None: it has none), and when it began."""

    process: subprocess.Popen[bytes]
    device: str | None
    began: float


def read_jobs(path: Path) -> list[Job]:
    """Raises ValueError, in one line, for what the format above does not have."""
    content = yaml.safe_load(path.read_text())
    entries = content.get("jobs") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries or [None]):
        raise ValueError(f"{path}: expected `jobs`, a list of mappings")
    variables = content.get("variables") or {}
    if not isinstance(variables, dict) or not all(isinstance(text, str) for text in variables.values()):
        raise ValueError(f"{path}: expected `variables`, a mapping of names to texts")
    jobs: dict[str, Job] = {}
    for entry in entries:
        name = entry.get("name")
        if not {"name", "command"} <= entry.keys() <= ACCEPTED.keys():
            found = ", ".join(map(str, entry))
            raise ValueError(f"job {name}: fields {found} found; accepted: {', '.join(ACCEPTED)}")
        for field, value in entry.items():
            kind, accepted = ACCEPTED[field]
            if not isinstance(value, kind) or (field == "name" and "/" in value):
                raise ValueError(f"job {name}: {field} {value!r} found; accepted: {accepted}")
        absent = [need for need in entry.get("needs", []) if need not in jobs]
        if absent or name in jobs:
            raise ValueError(f"job {name}: " + (f"needs {absent[0]}, no job above it" if absent else "is there twice"))
        command = filled(entry["command"], variables).strip()
        jobs[name] = Job(**entry | {"command": command, "needs": tuple(entry.get("needs", []))})
    return list(jobs.values())


def filled(text: str, variables: dict[str, str]) -> str:
    """A text with its variables in place, those of variables too.

    Raises ValueError for one that does not exist, or that is part of itself.
    """
    for _ in range(len(variables) + 1):
        names = _VARIABLE.findall(text)
        if not names:
            return text
        if absent := set(names) - variables.keys():
            raise ValueError(f"variable {min(absent)}: there are {', '.join(variables) or 'none'}")
        text = _VARIABLE.sub(lambda match: variables[match[1]], text)
    raise ValueError(f"a variable is part of itself: {text[:60]}")


def with_needs(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """Some of the jobs and all that these need, in the order of all. Raises ValueError for a name that there is not."""
    absent = set(names) - {job.name for job in jobs}
    if absent:
        raise ValueError(f"job {min(absent)}: there are {', '.join(job.name for job in jobs)}")
    wanted = set(names)
    for job in reversed(jobs):
        wanted |= set(job.needs) if job.name in wanted else set()
    return [job for job in jobs if job.name in wanted]


def run(jobs: Sequence[Job], folder: Path, devices: Sequence[str], seconds: float) -> dict[str, str]:
    """What became of each job: "done", "was done", "failed N", "ended" or "not reached", with its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    recipes = {job.name: "\n".join(each.command for each in with_needs(jobs, [job.name])) for job in jobs}
    became = {job.name: "was done" for job in jobs if _is_done(folder / f"{job.name}.done", recipes[job.name])}
    waiting = [job for job in jobs if job.name not in became]
    free, running = list(devices), dict[str, Running]()
    stop = threading.Event()
    handler = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        while True:
            for name, it in list(running.items()):
                if (code := it.process.poll()) is not None:
                    del running[name]
                    free += [it.device] if it.device is not None else []
                    took = f"{time.monotonic() - it.began:.0f} s"
                    became[name] = f"done {took}" if code == 0 else f"failed {code} {took}"
                    if code == 0:
                        (folder / f"{name}.done").write_text(recipes[name])
                    print(f"{name}: {became[name]}", flush=True)
            left = 0.0 if stop.is_set() else end - time.monotonic()
            for job in list(waiting):
                is_ready = all("done" in became.get(need, "") for need in job.needs)
                if is_ready and left > job.seconds and (free or not job.device):
                    waiting.remove(job)
                    running[job.name] = _start(job, folder, free.pop(0) if job.device else None)
            if left <= 0 or not running:
                break
            time.sleep(0.1)
    finally:
        _end([it.process for it in running.values()])
        became |= {name: f"ended {time.monotonic() - it.began:.0f} s" for name, it in running.items()}
        signal.signal(signal.SIGTERM, handler)
    return {job.name: became.get(job.name, "not reached") for job in jobs}


def _is_done(done: Path, recipe: str) -> bool:
    return done.is_file() and done.read_text() == recipe


def _start(job: Job, folder: Path, device: str | None) -> Running:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": device or ""}
    with (folder / f"{job.name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Running(process, device, time.monotonic())


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End jobs, all at the same time, with all that they have started."""
    groups = {process.pid for process in processes}
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + GRACE_SECONDS
        for group in _are_left(groups):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
        # bash, which a job began with, may end long before what it has started.
        while _are_left(groups) and time.monotonic() < until:
            time.sleep(0.1)
    for process in processes:
        process.poll()


def _are_left(groups: set[int]) -> set[int]:
    """Those of some process groups in which something runs."""
    left = set()
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            group = os.getpgid(process.pid)
            if group in groups and process.info["status"] != psutil.STATUS_ZOMBIE:
                left.add(group)
    return left


def _gpus() -> list[str]:
    """Those that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    # Parts of a GPU have lines of their own, below it.
    return [str(number) for number in range(len(re.findall("^GPU ", listed, re.MULTILINE)))]


def main(args: Sequence[str] | None = None) -> int:
    """Read, run, report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path, metavar="JOBS.yaml")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for .log and .done files")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all together; no bound by default")
    parser.add_argument("--devices", nargs="+", help="GPUs, as CUDA_VISIBLE_DEVICES names them; all by default")
    parser.add_argument("--only", nargs="+", help="these jobs and what they need")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(args)
    try:
        jobs = read_jobs(options.jobs)
        jobs = with_needs(jobs, options.only) if options.only else jobs
        is_needed = not options.list and any(job.device for job in jobs)
        devices = options.devices or (_gpus() if is_needed else [])
        if is_needed and not devices:
            raise ValueError("no GPU is there; accepted: --devices with names that CUDA_VISIBLE_DEVICES takes")
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(f"{job.name}: {job.command}" for job in jobs))
        return 0
    became = run(jobs, options.folder, devices, options.seconds)
    print("\n".join(f"{name:24s} {what}" for name, what in became.items()))
    return 0 if all("done" in what for what in became.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
