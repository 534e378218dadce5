"""`muse bench attention`: its options, the order of its work, and the files that it writes."""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from muse_kernels.attention.options import MuseOptions
from muse_kernels.cost import Work, dense_work, muse_work
from muse_lightning.errors import ExitCode, UserError
from muse_lightning.files import atomic_write, new_directory
from muse_lightning.measure.bench.error import HeadError, head_errors
from muse_lightning.measure.bench.figure import draw
from muse_lightning.measure.bench.gate import Check, run_gate
from muse_lightning.measure.bench.inputs import (
    QKV,
    Heads,
    cumulative_lengths,
    load_recorded,
    packed_lengths,
    random_inputs,
    recorded_inputs,
)
from muse_lightning.measure.bench.parts import Part, split_into_parts
from muse_lightning.measure.bench.records import PASSES, Measured, Results
from muse_lightning.measure.bench.report import (
    aligned,
    error_table,
    machine_line,
    parts_table,
    results_page,
    timing_table,
)
from muse_lightning.measure.bench.timing import Ceilings, CudaInstruments, Instruments, Timing, measure_ceilings
from muse_lightning.measure.bench.variants import Peer, Problem, UnavailableError, Variant, make_variant
from muse_lightning.measure.info import result_header

BACKWARD_SUFFIX = " backward"
EXACT = ("cudnn", "flash")
DEFAULT_MUSE = MuseOptions()


@dataclass(frozen=True)
class Settings:
    """The options of a run, checked.

    Raises:
        UserError: a value is not accepted.
    """

    muse: MuseOptions
    lengths: tuple[int, ...]
    heads: Heads
    documents: tuple[int, ...]
    recorded: dict[str, Tensor]
    uses_recorded: bool
    peers: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, values in (("lengths", self.lengths), ("documents", self.documents)):
            if any(value < 1 for value in values):
                raise UserError(f"{name}: expected positive numbers of tokens, found {list(values)}")
        if not self.lengths:
            raise UserError("lengths: expected at least one number of tokens, found []")
        heads = self.heads
        if heads.num_kv_heads < 1 or heads.num_heads < 1 or heads.num_heads % heads.num_kv_heads:
            raise UserError(
                f"heads: expected a multiple of kv_heads, found heads={heads.num_heads}, kv_heads={heads.num_kv_heads}"
            )
        if heads.head_dim < 8 or heads.head_dim % 8:
            raise UserError(f"head_dim: expected a multiple of 8, found {heads.head_dim}")
        if self.uses_recorded and not self.recorded:
            raise UserError("inputs: 'recorded' needs files, --recorded='[FILE, ...]'")
        sizes = {qkv.shape[-1] for qkv in self.recorded.values()}
        if self.uses_recorded and any(heads.head_dim % size for size in sizes):
            raise UserError(f"head_dim: expected a multiple of {sizes.pop()}, as recorded, found {heads.head_dim}")

    def inputs(self, num_tokens: int, device: str) -> QKV:
        """q, k and v of this length."""
        if self.uses_recorded:
            return recorded_inputs(list(self.recorded.values()), num_tokens, self.heads, device)
        return random_inputs(num_tokens, self.heads, device)

    def document_lengths(self, num_tokens: int) -> list[int]:
        """What is attended separately."""
        return packed_lengths(self.documents, num_tokens) if self.documents else [num_tokens]


def bench_attention(
    lengths: tuple[int, ...] = (8192, 16384, 65536, 131072),
    heads: int = 16,
    kv_heads: int = 16,
    head_dim: int = 128,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    muse: MuseOptions = DEFAULT_MUSE,
    documents: tuple[int, ...] | None = None,
    inputs: Literal["random", "recorded"] = "random",
    recorded: tuple[Path, ...] | None = None,
    peers: tuple[Peer, ...] = ("cudnn", "flash", "flex", "nsa"),
    repeats: int = 30,
    seconds: float = 1.0,
    out: Path | None = None,
    check_only: bool = False,
) -> None:
    """Time MuSe attention beside other attention on this GPU, after a check that it computes the right thing.

    Writes results.jsonl, results.md and attention.png. Exit code 1 if the check fails: then nothing is timed.

    Args:
        lengths: Tokens of a row, one problem each.
        heads: Query heads.
        kv_heads: Key and value heads; heads is a multiple.
        head_dim: Size of a head.
        dtype: Of q, k and v.
        muse: Options of muse_attention: chunk, top_k, causal (of the peers too), implementation and the others.
        documents: Lengths of packed documents, repeated until a row is full; null is one document. Then FlashAttention
            is PyTorch's variable-length kernel, and cuDNN is called for one document after the other.
        inputs: random normal numbers, or made of recorded heads.
        recorded: Files of recorded heads, [3, N, D] each: q after RoPE and before scaling, k after RoPE, v. The error
            of MuSe attention on each is measured too.
        peers: What to time beside MuSe: PyTorch's cuDNN attention, its FlashAttention, FlexAttention on as many keys
            as MuSe attends exactly, NSA of flash-linear-attention, and MuSe in plain PyTorch (reference).
        repeats: Most timed runs of each variant and pass.
        seconds: Time aimed at for each variant and pass; 5 runs are made even if they take longer.
        out: Folder to write, which must not exist; null is a new one in runs/bench.
        check_only: Check and stop; needs no GPU.
    """
    if repeats < 1 or seconds <= 0:
        raise UserError(f"repeats and seconds must be positive, found repeats={repeats}, seconds={seconds}")
    settings = Settings(
        muse=muse,
        lengths=tuple(lengths),
        heads=Heads(heads, kv_heads, head_dim, getattr(torch, dtype)),
        documents=tuple(documents or ()),
        recorded=load_recorded(recorded or ()),
        uses_recorded=inputs == "recorded",
        peers=tuple(dict.fromkeys(peers)),
    )
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not check_only:
        raise UserError(
            "muse bench attention needs an NVIDIA GPU; --check_only=true checks without timing, on any machine"
        )
    if check_only:
        pass_gate(settings, "cuda" if has_gpu else "cpu")
        return
    folder = out or _default_folder()
    with new_directory(folder, "out") as temporary:
        checks = pass_gate(settings, "cuda")
        write(run_benchmark(settings, checks, CudaInstruments(repeats, seconds)), temporary)
    print(f"{folder}: results.jsonl, results.md, attention.png")


def pass_gate(settings: Settings, device: str) -> list[Check]:
    """Check that MuSe attention is right; print one line.

    Raises:
        SystemExit: it is not (exit code 1). UserError: its implementation does not take these options here.
    """
    try:
        checks = run_gate(settings.muse, settings.heads, has_documents=bool(settings.documents), device=device)
    except ValueError as error:
        raise UserError(f"muse: {error}") from error
    failed = [check for check in checks if not check.is_passed]
    if failed:
        more = f" (and {len(failed) - 1} more of {len(checks)} comparisons)" if len(failed) > 1 else ""
        print(f"error: muse_attention is wrong, nothing is timed: {failed[0]}{more}", file=sys.stderr)
        raise SystemExit(ExitCode.BUG)
    nearest = max(checks, key=lambda check: check.error / check.limit)
    what = f"check on {device}"
    if device == "cpu" and settings.muse.implementation != "triton":
        what += " of plain PyTorch alone (kernels: TRITON_INTERPRET=1 and --muse.implementation=triton)"
    print(f"{what}: {len(checks)} comparisons with the reference passed; nearest to its limit, {nearest}")
    return checks


def run_benchmark(settings: Settings, checks: Sequence[Check], instruments: Instruments) -> Results:
    """Time everything, one length after the other; print the tables of each as soon as it is done."""
    ceilings = measure_ceilings(instruments, settings.heads.dtype)
    header = _header(settings, ceilings)
    print(machine_line(header))
    measured: list[Measured] = []
    parts: dict[int, list[Part]] = {}
    errors: list[HeadError] = []
    results = Results(header, checks, measured, parts, errors)
    for num_tokens in settings.lengths:
        at_length, muse = _measure_length(settings, num_tokens, ceilings, instruments)
        measured += at_length
        print("\n" + aligned(timing_table(results, num_tokens)), flush=True)
        timing = at_length[0].timings.get("forward_backward")
        if muse is not None and timing is not None:
            kernels = instruments.kernel_times(muse.forward_backward)
            work = _work("muse", settings, num_tokens)
            parts[num_tokens] = split_into_parts(kernels, timing.median_ms, work, ceilings)
            print("\n" + aligned(parts_table(parts[num_tokens])), flush=True)
    for name, qkv in settings.recorded.items():
        errors += head_errors(name, qkv, settings.muse, settings.heads.dtype, instruments.device)
    if errors:
        print("\n" + aligned(error_table(errors)), flush=True)
    return results


def write(results: Results, folder: Path) -> None:
    """Write the files of a run to an existing folder."""
    atomic_write(folder / "results.jsonl", results.json_lines())
    atomic_write(folder / "results.md", results_page(results))
    atomic_write(folder / "attention.png", draw(results))


def _measure_length(
    settings: Settings, num_tokens: int, ceilings: Ceilings, instruments: Instruments
) -> tuple[list[Measured], Variant | None]:
    """What was found for MuSe and then each peer, and MuSe's variant if it could be run."""
    lengths = settings.document_lengths(num_tokens)
    cu_seqlens = cumulative_lengths(lengths) if settings.documents else None
    problem = Problem(settings.inputs(num_tokens, instruments.device), settings.muse, cu_seqlens)
    variants: dict[str, Variant] = {}
    reasons: dict[str, str] = {}
    for name in ("muse", *settings.peers):
        try:
            variant = make_variant(name, problem)
            variant.forward_backward()
            variants[name] = variant
        except torch.OutOfMemoryError:
            reasons[name] = "out of memory"
        except UnavailableError as error:
            reasons[name] = str(error)
        except Exception as error:
            # A peer that fails is a row that says so; what this project's own code raises is a bug.
            if name in ("muse", "reference"):
                raise
            reasons[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
    runs: dict[str, Callable[[], object]] = {}
    for name, variant in variants.items():
        runs[f"{name} forward"] = variant.forward
        runs[f"{name} forward_backward"] = variant.forward_backward
    timings = instruments.time(runs)
    measured = []
    for name in ("muse", *settings.peers):
        if name in reasons:
            measured.append(Measured(name, num_tokens, {}, reason=reasons[name]))
            continue
        found: dict[str, Timing] = {of_pass: timings[f"{name} {of_pass}"] for of_pass in PASSES}
        peak = instruments.peak_bytes(variants[name].forward_backward) / 1024**2
        fractions = _flops_fractions(_work(name, settings, num_tokens), found, ceilings)
        measured.append(Measured(name, num_tokens, found, peak, fractions))
    return measured, variants.get("muse")


def _work(name: str, settings: Settings, num_tokens: int) -> dict[str, Work]:
    """Work of a variant by part; empty where it is not counted."""
    lengths, sizes = settings.document_lengths(num_tokens), settings.heads.sizes
    if name in EXACT:
        return dense_work(lengths, causal=settings.muse.causal, **sizes)
    if name != "muse":
        return {}
    return muse_work(lengths, settings.muse, has_documents=bool(settings.documents), **sizes)


def _flops_fractions(work: dict[str, Work], timings: dict[str, Timing], ceilings: Ceilings) -> dict[str, float]:
    flops = {"forward": 0.0, "forward_backward": 0.0}
    for part, each in work.items():
        flops["forward_backward"] += each.flops
        if not part.endswith(BACKWARD_SUFFIX):
            flops["forward"] += each.flops
    if not work:
        return {}
    return {
        of_pass: flops[of_pass] / (timing.median_ms / 1000) / ceilings.flops_per_s
        for of_pass, timing in timings.items()
    }


def _header(settings: Settings, ceilings: Ceilings) -> dict[str, Any]:
    heads = settings.heads
    return {
        **result_header("cuda" if torch.cuda.is_available() else "cpu"),
        "options": {
            "heads": heads.num_heads,
            "kv_heads": heads.num_kv_heads,
            "head_dim": heads.head_dim,
            "dtype": str(heads.dtype).removeprefix("torch."),
            "inputs": "recorded" if settings.uses_recorded else "random",
            "recorded": list(settings.recorded),
            "documents": list(settings.documents),
            "muse": dataclasses.asdict(settings.muse),
        },
        "ceilings": dataclasses.asdict(ceilings),
    }


def _default_folder() -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return Path("runs/bench") / f"{datetime.now().astimezone():%Y-%m-%d_%H%M%S}_{device}_attention"
