"""Kernels are grouped by their names, and compared with the work that is counted."""

import re
from pathlib import Path

import pytest

import muse_kernels
from muse_kernels.attention.options import MuseOptions
from muse_kernels.cost import Work, muse_work
from muse_lightning.measure.bench.parts import part_of, split_into_parts
from muse_lightning.measure.bench.timing import Ceilings

WORK = muse_work([65536], MuseOptions(), num_heads=16, num_kv_heads=16, head_dim=128, element_size=2)
CEILINGS = Ceilings(flops_per_s=1e12, bytes_per_s=1e9)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("muse_cluster_split", "clustering"),
        ("muse_cluster_means", "clustering"),
        ("muse_gather", "gather"),
        ("muse_summaries", "stage 1"),
        ("muse_scores", "scores"),
        ("muse_select", "selection"),
        ("muse_select_by_peaks", "scores"),
        ("muse_far", "far"),
        ("muse_far_0d1d2d", "far"),
        ("muse_far_backward", "far backward"),
        ("muse_retrieved_partials", "keys backward"),
        ("muse_key_gradients", "keys backward"),
        ("muse_fancy_step", "fancy step"),
        ("muse_farther", "farther"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128", "near"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x128", "near backward"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128>>", "near"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "near backward"),
        ("void pytorch_flash::flash_bwd_convert_dq_kernel<...>", "near backward"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention...)", "near"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<int>>", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_part_of_a_kernel(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_every_kernel_of_the_package_has_a_part_that_is_reported() -> None:
    folder = Path(muse_kernels.__file__).parent / "attention"
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    kernels = re.findall(r"@triton\.jit[^@]*?\ndef (muse_\w+)", sources)
    assert len(kernels) > 10
    known = {*WORK, "selection"}
    assert [kernel for kernel in kernels if part_of(kernel) not in known] == []


def test_split() -> None:
    kernels = {
        "sort": 1.0,
        "muse_far": 3.0,
        "muse_select": 0.5,
        "muse_scores": 2.0,
        "muse_summaries": 0.5,
        "muse_cluster_a": 1.0,
        "muse_x": 0.5,
    }
    kernels["muse_cluster_b"] = 1.0
    work = {
        "clustering": Work(0, 5e5),
        "scores": Work(1e9, 1e6),
        "stage 1": Work(2e8, 1e6),
        "far": Work(6e8, 3e6),
        "stage 1 backward": Work(1e8, 5e5),
        "keys backward": Work(1, 1),
    }
    parts = split_into_parts(kernels, 10.0, work, CEILINGS)
    assert [part.name for part in parts] == [
        "clustering",
        "scores",
        "selection",
        "stage 1",
        "far",
        "x",
        "other",
        "between kernels",
    ]
    found = {part.name: part for part in parts}
    assert sum(part.ms for part in parts) == pytest.approx(10.0)
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    assert found["far"].flops_fraction == pytest.approx(0.2)  # 6e8 FLOPs in 3 ms of 1e12 a second
    assert found["far"].bytes_fraction == pytest.approx(1.0)
    assert (found["clustering"].ms, found["clustering"].flops_fraction) == (2.0, None)
    assert found["clustering"].bytes_fraction == pytest.approx(0.25)
    assert found["stage 1"].flops_fraction == pytest.approx(0.6)  # twice, under the same name
    assert found["other"].bytes_fraction is None
    assert found["between kernels"].ms == pytest.approx(0.5)


def test_kernels_that_overlap_leave_nothing_between() -> None:
    assert split_into_parts({"muse_far": 12.0}, 10.0, WORK, CEILINGS)[-1].ms == 0
