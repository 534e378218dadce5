"""What `muse info` says of a machine: versions, devices, attention kernels."""

import platform
import re
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from muse_kernels.attention.checks import HAS_TRITON
from muse_lightning import __version__
from muse_lightning.measure.installed import installed, lock_sha256, source_sha256

PACKAGES = ("torch", "lightning", "triton", "litdata", "jsonargparse", "tokenizers", "numpy")
PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
MIB, GIB = 1024**2, 1024**3
MIXED_DTYPES = {"16-mixed": torch.float16, "16": torch.float16, "bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16}
TRUE_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64, "64": torch.float64}
"""Lightning's names of precisions: dtype of autocast, and of the parameters where that is not float32."""


def environment() -> dict[str, Any]:
    """Versions and devices, as plain data."""
    return {
        "muse_lightning": __version__,
        "git_revision": git_revision(PACKAGE_FOLDER),
        "python": platform.python_version(),
        "platform": platform.platform(),
        # A build of torch (+cpu, +cu130) is in its own version, not always in that of its distribution.
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": str(torch.__version__)},
        "devices": devices(),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def run_environment() -> dict[str, Any]:
    """What a run depends on beside its configuration and data, as plain data for environment.json: `environment`, our
    sources and every distribution that is installed."""
    return environment() | {
        "source_sha256": source_sha256(),
        "lock_sha256": lock_sha256(),
        "distributions": installed(),
    }


def result_header(device: str) -> dict[str, Any]:
    """What a file of measurements begins with: when, by which command, on what.

    Args:
        device: "cuda" or "cpu", where it was measured.
    """
    found = environment()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["muse", *sys.argv[1:]]),
        **found,
        "device": found["devices"][torch.cuda.current_device()] if device == "cuda" else _processor(),
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
    return [_processor()]


def _processor() -> str:
    # Its vector instructions and threads decide in which order numbers are added.
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {capability}, {torch.get_num_threads()} threads, {psutil.virtual_memory().total / GIB:.0f} GiB"


def driver_version() -> str | None:
    """The NVIDIA driver's version; None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def attention_kernels() -> dict[str, str]:
    """Which implementation attention uses here: exact for whole rows, exact for documents, and Muse's by itself."""
    muse = "plain PyTorch (reference)"
    if HAS_TRITON and torch.cuda.is_available():
        muse = "Triton kernels, plain PyTorch for sizes and dtypes that they do not take"
    if not torch.cuda.is_available():
        return {"exact": "PyTorch SDPA", "documents": "PyTorch SDPA, one document after the other", "muse": muse}
    kernels = {
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.is_available(),
        "FlashAttention": torch.backends.cuda.flash_sdp_enabled()
        and torch.backends.cuda.is_flash_attention_available(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    fastest = next((name for name, is_available in kernels.items() if is_available), "plain PyTorch")
    return {"exact": fastest, "documents": "FlashAttention, variable length, in half precision", "muse": muse}


def machine_report() -> str:
    """What `muse info` prints about the machine."""
    found = environment()
    revision = f" at {found['git_revision']}" if found["git_revision"] else ""
    lines = [f"muse-lightning {found['muse_lightning']}{revision}", f"Python {found['python']} on {found['platform']}"]
    lines += [f"{name} {number or 'not installed'}" for name, number in found["packages"].items()]
    lines += [f"CUDA {found['cuda']}, driver {found['driver']}"] if found["cuda"] else []
    lines += [f"device {index}: {text}" for index, text in enumerate(found["devices"])]
    lines += [f"attention kernel, {kind}: {kernel}" for kind, kernel in attention_kernels().items()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
