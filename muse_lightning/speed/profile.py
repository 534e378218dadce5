"""`muse profile`: where the time and the memory of a recipe's training step go."""

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from muse_lightning.data.batches import to_device
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_write, new_directory
from muse_lightning.measure.bench.parts import Part as Kernels
from muse_lightning.measure.bench.parts import split_into_parts
from muse_lightning.measure.bench.report import NONE, Row, aligned, machine_line, markdown
from muse_lightning.measure.bench.timing import Ceilings, CudaInstruments, Instruments, measure_ceilings
from muse_lightning.measure.info import MIXED_DTYPES, TRUE_DTYPES, result_header
from muse_lightning.recipe_cli import MuseCLI
from muse_lightning.speed.batches import check_documents, random_batch
from muse_lightning.speed.parts import Part, attention_passes, time_parts
from muse_lightning.speed.recorder import SNAPSHOT_NAME, TRACE_NAME, Recorder
from muse_lightning.speed.steps import Steps, time_steps

GIB = 1024**3


@dataclass(frozen=True)
class ProfileOptions:
    """What `muse profile` records."""

    documents: tuple[int, ...] | None = None
    """Lengths of packed documents, repeated until a row is full; null is one document in a row, without a mask."""
    warmup: int = 3
    """Steps before those that are timed."""
    steps: int = 5
    """Steps that are timed."""
    traced_steps: int = 2
    """Steps that are recorded for the trace and the snapshot of memory, after others; 0: neither is made."""
    repeats: int = 10
    """Timed runs of each part, at most."""
    out: Path | None = None
    """Folder to write, which must not exist; null is a new one in runs/profile."""

    def __post_init__(self) -> None:
        check_documents(self.documents)
        for name, least in (("warmup", 1), ("steps", 1), ("traced_steps", 0), ("repeats", 1)):
            if getattr(self, name) < least:
                raise UserError(f"bench.{name}: {getattr(self, name)} found, at least {least} expected")


@dataclass(frozen=True)
class Profile:
    """What was found.

    Attributes:
        whole: Optimizer steps as they are trained.
        parts: Of one micro-batch, each alone.
        kernels: Of attention in one layer, forward and backward, by its own steps; by the name of the part.
        accumulated: Micro-batches of a step.
    """

    whole: Steps
    parts: Sequence[Part]
    kernels: Mapping[str, Sequence[Kernels]]
    ceilings: Ceilings
    accumulated: int

    @property
    def step_ms(self) -> float:
        """The median step."""
        return 1000 * median(self.whole.seconds)

    @property
    def rest_ms(self) -> float:
        """What no part accounts for: waiting for data and for the host, norms and sums outside of blocks."""
        *micro, optimizer = self.parts
        return self.step_ms - self.accumulated * sum(part.ms for part in micro) - optimizer.ms


def profile_recipe(verb: str, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """`muse profile --config RECIPE [--bench.KEY=VALUE ...]`."""
    cli = MuseCLI(verb, description, args, allowed, builds="model", options=ProfileOptions)
    options = ProfileOptions(**cli.config.bench.as_dict())
    if not torch.cuda.is_available():
        raise UserError("muse profile needs an NVIDIA GPU; muse info --config counts a recipe's work on any machine")
    folder = options.out or Path("runs/profile") / f"{datetime.now().astimezone():%Y-%m-%d_%H%M%S}"
    header = result_header("cuda")
    with new_directory(folder, "bench.out") as temporary:
        found = profile(cli, options, CudaInstruments(options.repeats, seconds=0.5), temporary)
        lines = [{"record": "header", **header}, *records(found)]
        atomic_write(temporary / "results.jsonl", "".join(json.dumps(each, default=str) + "\n" for each in lines))
        atomic_write(temporary / "results.md", page(header, found))
        names = sorted(path.name for path in temporary.iterdir())
    print(aligned(table(found)))
    print(f"{folder}: {', '.join(names)}")


def profile(cli: MuseCLI, options: ProfileOptions, instruments: Instruments, folder: Path) -> Profile:
    """Time whole steps and each part, and record a trace.

    Args:
        folder: for the trace and the snapshot.
    """
    data, trainer = cli.config.data, cli.config.trainer.as_dict()
    config = cli.config.model.clone()
    config.weights = None
    model = cli.instantiate_model(config)
    batch = random_batch(model.config.vocab_size, data.batch_size, data.seq_len, options.documents)
    whole = time_steps(model, trainer, batch, options.warmup, options.steps)
    if options.traced_steps:
        model = cli.instantiate_model(config)  # in place of the other one: two may not fit
        time_steps(model, trainer, batch, options.warmup, options.traced_steps, [Recorder(folder, options.warmup)])
    del model
    gc.collect()
    # A model of its own: what is computed again is part of the other one.
    config.recompute = "none"
    alone = cli.instantiate_model(config)
    with torch.device(instruments.device):
        alone.configure_model()
    precision = str(trainer["precision"])
    alone.llama.to(TRUE_DTYPES.get(precision, torch.float32))
    autocast = MIXED_DTYPES.get(precision)
    ceilings = measure_ceilings(instruments, autocast or TRUE_DTYPES.get(precision, torch.float32))
    moved = to_device(batch, torch.device(instruments.device))
    parts = time_parts(alone, moved, cli.config.model.recompute, instruments, ceilings, autocast)
    layer_ms = {part.name: part.layer_ms for part in parts}
    kernels = {
        name: split_into_parts(instruments.kernel_times(run), layer_ms[name], {}, ceilings)
        for name, run in attention_passes(alone, moved, autocast, instruments.device).items()
    }
    return Profile(whole, parts, kernels, ceilings, trainer["accumulate_grad_batches"])


def table(found: Profile) -> list[Row]:
    """A row for each part of a step, the kernels of attention under it, and the step itself."""
    rows: list[Row] = [["part", "ms", "of step", "forward ms", "TFLOP", "of matmul", "of copy"]]
    for part in found.parts:
        is_optimizer = part is found.parts[-1]
        ms = part.ms if is_optimizer else found.accumulated * part.ms
        rows.append(
            [
                part.name,
                f"{ms:.2f}",
                f"{ms / found.step_ms:.1%}",
                f"{part.forward_ms:.2f}" if part.forward_ms else NONE,
                f"{part.flops / 1e12:.2f}" if part.flops else NONE,
                _share(part.flops_fraction),
                _share(part.bytes_fraction),
            ]
        )
        for kernels in found.kernels.get(part.name, ()):
            scaled = kernels.share * ms
            rows.append([f"  {kernels.name}", f"{scaled:.2f}", f"{scaled / found.step_ms:.1%}", *[NONE] * 4])
    rest = found.rest_ms
    rows.append(["rest", f"{rest:.2f}", f"{rest / found.step_ms:.1%}", *[NONE] * 4])
    rows.append(["step", f"{found.step_ms:.2f}", "100.0%", *[NONE] * 4])
    return rows


def records(found: Profile) -> list[dict[str, Any]]:
    """For JSON lines."""
    return [
        {"record": "steps", **asdict(found.whole), "accumulated": found.accumulated},
        {"record": "ceilings", **asdict(found.ceilings)},
        *({"record": "part", **asdict(part)} for part in found.parts),
        *(
            {"record": "kernels of attention", "part": name, **asdict(kernels)}
            for name, of_part in found.kernels.items()
            for kernels in of_part
        ),
        {"record": "rest", "ms": found.rest_ms},
    ]


def page(header: Mapping[str, Any], found: Profile) -> str:
    """The Markdown file of a profile."""
    peak = found.whole.peak_bytes
    sections = [
        f"# Where a training step's time goes, {header['device']}",
        f"Machine: {machine_line(dict(header))}. Commit {header['git_revision'] or 'unknown'}. {header['date']}.",
        f"    {header['command']}",
        f"Step: {found.step_ms:.1f} ms, the median of {len(found.whole.seconds)}; peak memory "
        f"{NONE if peak is None else f'{peak / GIB:.1f} GiB'}. Ceilings measured here: "
        f"{found.ceilings.flops_per_s / 1e12:.0f} TFLOP/s (8192^3 product), "
        f"{found.ceilings.bytes_per_s / 1e12:.2f} TB/s (copy).",
        markdown(table(found)),
        "Each part is timed alone, in all layers, forward, backward, and forward once more where the recipe computes "
        "it again. TFLOP: its matrix products, those computed again included. Under attention: its kernels, by the "
        "share of one layer's pass. Rest: the step without its parts.",
        f"{TRACE_NAME}: open it in ui.perfetto.dev. {SNAPSHOT_NAME}: in pytorch.org/memory_viz.",
    ]
    return "\n\n".join(sections) + "\n"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}"
