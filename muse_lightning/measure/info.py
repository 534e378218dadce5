"""What this machine is: versions, devices, and which attention kernels will run on it."""

import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from muse_lightning import __version__

PACKAGES = ("torch", "lightning", "triton", "litdata", "jsonargparse", "tokenizers", "numpy")
PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
GIB = 1024**3


def environment() -> dict[str, Any]:
    """What a run depends on beside its configuration, as plain data for environment.json."""
    return {
        "muse_lightning": __version__,
        "git_revision": git_revision(PACKAGE_FOLDER),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices(),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def git_revision(folder: Path) -> str | None:
    """The commit that `folder` is at, with `-dirty` where tracked files differ; None if git does not track it.

    An installed package can lie inside somebody else's repository, whose revision would say nothing about it.
    """
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = ask("rev-parse", "HEAD")
    return f"{revision}-dirty" if revision and ask("status", "--porcelain", "--untracked-files=no", ".") else revision


def devices() -> list[str]:
    """One line per GPU; on a machine without one, a line for the CPU."""
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [f"{p.name}, {p.total_memory / GIB:.0f} GiB, sm_{p.major}{p.minor}" for p in properties]
    memory = psutil.virtual_memory().total / GIB
    return [f"CPU, {torch.get_num_threads()} threads, {memory:.0f} GiB"]


def driver_version() -> str | None:
    """The NVIDIA driver's version; None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def attention_kernels() -> dict[str, str]:
    """Which implementation each attention strategy uses on this machine."""
    if not torch.cuda.is_available():
        return {"exact": "PyTorch SDPA, CPU", "muse": "reference, plain PyTorch"}
    return {"exact": "PyTorch SDPA and varlen flash attention, CUDA", "muse": "reference, plain PyTorch"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def report(recipe: Any) -> str:
    return str(environment())
