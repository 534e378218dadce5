"""Compile every kernel launch of MuSe attention for a GPU that need not be there, and report what each one takes.

    python offline.py TARGET < CASES > REPORT        TARGET: 80, 86, 89, 90, 100; CASES, REPORT: JSON, as below

A program of its own: Triton's interpreter, which the tests run under, has to be off before a kernel is imported. The
operator runs on tensors without data ("meta"), launches are recorded, and each is compiled once, by Triton's own launch
code, for a driver that only says which GPU it stands for. What is in Triton's cache (TRITON_CACHE_DIR) is not compiled.
"""

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import muse_kernels.attention
from muse_kernels.attention import near_field, streaming, tiles
from muse_kernels.attention.options import MuseOptions

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one block may have, by compute capability (CUDA C++ Programming Guide, "Technical Specifications")."""

TENSOR_MEMORY = 512
"""Columns of tensor memory that one block may have on sm_100."""

NUM_TOKENS = 16384
"""Eight chunks of the default size; lengths are not built into kernels."""


class Case(NamedTuple):
    """Inputs and options of one call."""

    head_dim: int
    dtype: str
    heads_per_kv_head: int
    options: dict[str, Any]


class Launch(NamedTuple):
    """A kernel as it is compiled for one launch."""

    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    case: Case

    @property
    def key(self) -> tuple[Any, ...]:
        """Launches of equal keys share what is compiled."""
        by_name = {parameter.name: parameter for parameter in self.function.params}
        arguments: list[tuple[str, Any]] = []
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                arguments.append((name, str(value.dtype)))
            elif by_name[name].is_constexpr:
                arguments.append((name, value))
            elif isinstance(value, int) and not by_name[name].do_not_specialize:
                arguments.append((name, "one" if value == 1 else "aligned" if value % 16 == 0 else "any"))
        return (self.function.__name__, *sorted(arguments), *sorted(self.options.items()))


class Usage(NamedTuple):
    """What a compiled kernel takes. Counts are None where the tool does not know the GPU."""

    kernel: str
    constants: dict[str, Any]
    case: Case
    error: str | None = None
    shared: int = 0
    """Bytes of shared memory."""
    tensor_memory: int = 0
    """Columns of tensor memory, which sm_100 has."""
    registers: int | None = None
    stack: int | None = None
    """Bytes of local memory per thread: spilled registers."""
    products: int = 0
    """Matrix products in the kernel as written (tl.dot)."""
    matrix_instructions: int | None = None
    """Of Hopper's matrix units (HGMMA); None for other GPUs."""


class Driver:
    """As much of a GPU's driver as compiling needs."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)


def kernel_names() -> list[str]:
    """Every kernel in the package."""
    names = set()
    for module in pkgutil.iter_modules(muse_kernels.attention.__path__):
        members = vars(importlib.import_module(f"muse_kernels.attention.{module.name}")).values()
        names |= {x.__name__ for x in members if isinstance(x, JITFunction) and x.__name__.startswith("muse_")}
    return sorted(names)


def launches_of(case: Case) -> Iterator[Launch]:
    """What one forward and backward pass launches, in order."""
    recorded: list[Launch] = []

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in function.params]
        arguments = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        options = {name: value for name, value in kwargs.items() if name not in names}
        recorded.append(Launch(function, arguments, options, case))

    compile_run, JITFunction.run = JITFunction.run, record
    try:
        options = MuseOptions(**case.options).resolved(case.head_dim)
        q, k, v = (
            torch.empty(1, heads, NUM_TOKENS, case.head_dim, dtype=getattr(torch, case.dtype), device="meta")
            for heads in (4, 4 // case.heads_per_kv_head, 4 // case.heads_per_kv_head)
        )
        out, lse, clusters = streaming.attention_forward(q, k, v, None, None, options)
        streaming.attention_backward(out, q, k, v, out, lse, None, clusters, options)
    finally:
        JITFunction.run = compile_run
    yield from recorded


def without_near_field(target: int) -> None:
    """Have the operator run without data: the libraries' near field is left out, and the device is `target`."""

    def forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)

    def backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    assert streaming.near_field is near_field.near_field
    streaming.near_field = forward
    streaming.near_field_backward = backward
    tiles.shared_memory = lambda device_index: SHARED_MEMORY[target]


def usage(launch: Launch) -> Usage:
    """Compile one launch for the active driver."""
    constants = {p.name: launch.arguments[p.name] for p in launch.function.params if p.is_constexpr}
    found = Usage(launch.function.__name__, constants | launch.options, launch.case)
    try:
        compiled = launch.function.run(grid=None, warmup=True, **launch.arguments, **launch.options)
    except Exception as error:
        return found._replace(error=f"{type(error).__name__}: {error}")
    found = found._replace(
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        products=compiled.asm["ttir"].count(" tt.dot "),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = cuobjdump("-res-usage", file.name)
        if counts := re.search(r"REG:(\d+) STACK:(\d+)", text):
            found = found._replace(registers=int(counts[1]), stack=int(counts[2]))
        if compiled.metadata.target.arch == 90:
            found = found._replace(matrix_instructions=cuobjdump("-sass", file.name).count("HGMMA"))
    return found


def cuobjdump(*arguments: str) -> str:
    """Output of NVIDIA's tool, the one that comes with Triton."""
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


_launches: list[Launch] = []
"""What is to be compiled; forked processes inherit it, tensors without data cannot be sent."""


def _usage_at(index: int) -> Usage:
    return usage(_launches[index])


def usages(target: int, cases: list[Case]) -> list[Usage]:
    """Every different launch of these cases, compiled for one target by as many processes as there are cores."""
    without_near_field(target)
    triton.runtime.driver.set_active(Driver(target))
    _launches[:] = {launch.key: launch for case in cases for launch in launches_of(case)}.values()
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_usage_at, range(len(_launches)), chunksize=1)


def main() -> None:
    """Read cases, write {"kernels": every kernel there is, "usages": ...}."""
    cases = [Case(*case) for case in json.load(sys.stdin)]
    json.dump({"kernels": kernel_names(), "usages": usages(int(sys.argv[1]), cases)}, sys.stdout)


if __name__ == "__main__":
    main()
