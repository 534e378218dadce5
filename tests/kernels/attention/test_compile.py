"""Every kernel compiles for the GPUs that it is meant for and fits their shared memory; no GPU is needed.

What runs here is `offline.py`, a program of its own. Kernels are found, not listed: one that no case launches fails.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.attention.offline import SHARED_MEMORY, TENSOR_MEMORY, Case, Usage

TARGETS = [80, 89, 90, 100]
"""Compute capabilities: A100, RTX 40, H100 and H200, B200."""

NARROW = [(d, dtype) for d in (16, 64, 96, 128) for dtype in ("bfloat16", "float16")] + [
    (16, "float32"),
    (64, "float32"),
]
HOPPER_ONLY = [(256, "bfloat16"), (128, "float32")]
"""Heads whose rows take 512 bytes: no other GPU has the memory (`tiles.fits`)."""

EACH_KERNEL: list[dict[str, Any]] = [{}, {"selection": "centroid"}]
FORMS: list[dict[str, Any]] = [
    *EACH_KERNEL,
    {"causal": False},
    {"order": 0},
    {"order": 0, "causal": False},
    {"top_k": 0},
    {"top_k": 0, "causal": False},
]

# Bytes of local memory per thread. At head size 64 few registers are spilled, most in muse_far_backward (56 bytes); at
# 128 accumulators fill them all: what is spilled is mostly used outside the loops over keys, and tiles that spill less
# were slower on an H100 and an H200.
LARGEST_STACK = {64: 64, 128: 512}


def compiled(target: int, cases: list[Case]) -> tuple[set[str], list[Usage]]:
    """Names of all kernels, and what each launch of these cases takes; nothing failed and all of it fits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("offline.py")), str(target)],
            input=json.dumps(cases),
            capture_output=True,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": cache},
            check=False,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)
    usages = [Usage(*usage)._replace(case=Case(*usage[2])) for usage in report["usages"]]
    assert usages
    limits = f"accepted: {SHARED_MEMORY[target]} bytes of shared memory, {TENSOR_MEMORY} columns of tensor memory"
    failures = [
        f"{usage}; {limits}"
        for usage in usages
        if usage.error or usage.shared > SHARED_MEMORY[target] or usage.tensor_memory > TENSOR_MEMORY
    ]
    assert not failures, "\n".join(failures)
    return set(report["kernels"]), usages


@pytest.mark.parametrize(
    "target",
    # The one that recipes are for, and the one with the least shared memory.
    [90, 89, *(pytest.param(target, marks=(pytest.mark.slow, pytest.mark.exhaustive)) for target in (80, 100))],
    ids="sm_{}".format,
)
def test_every_kernel_fits(target: int) -> None:
    """Heads of 64 and 128 in bfloat16, causal, as recipes use them; also a single key-value head: a 1 is a constant."""
    cases = [Case(128, "bfloat16", 1, {}), *(Case(64, "bfloat16", 4, options) for options in EACH_KERNEL)]
    kernels, usages = compiled(target, cases)
    assert {usage.kernel for usage in usages} == kernels
    if target == 90:
        assert_fast_on_hopper(usages)


def assert_fast_on_hopper(usages: list[Usage]) -> None:
    """Few registers spilled, and products go through Hopper's own matrix units."""
    for usage in usages:
        assert usage.stack is not None
        assert usage.stack <= LARGEST_STACK[usage.case.head_dim], usage
        if usage.products:
            assert usage.matrix_instructions, usage


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("head_dim", "dtype"), HOPPER_ONLY)
def test_wide_rows_fit_hopper(head_dim: int, dtype: str) -> None:
    compiled(90, [Case(head_dim, dtype, 1, {})])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("head_dim", "dtype"), NARROW)
@pytest.mark.parametrize("target", TARGETS, ids="sm_{}".format)
def test_every_form_fits(target: int, head_dim: int, dtype: str) -> None:
    """All options of all head sizes; of float16 and float32 the two ends."""
    forms = FORMS if dtype == "bfloat16" else [{}, {"order": 0, "causal": False, "top_k": 0}]
    compiled(target, [Case(head_dim, dtype, heads, options) for options in forms for heads in (1, 4)])
