"""`muse bench training`: a recipe beside its dense twin, in one process."""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from jsonargparse import Namespace

from muse_lightning.attention import Dense
from muse_lightning.data.batches import document_lengths
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_write, new_directory
from muse_lightning.measure.bench.report import NONE, Row, aligned, machine_line, markdown
from muse_lightning.measure.device_peak import half_precision_peak
from muse_lightning.measure.flops import attention_flops_per_token, training_flops_per_token
from muse_lightning.measure.info import result_header
from muse_lightning.parallelize import Recompute
from muse_lightning.recipe_cli import MuseCLI
from muse_lightning.speed.batches import check_documents, random_batch
from muse_lightning.speed.steps import Steps, time_steps
from muse_lightning.training.memory import StepMemory, step_memory
from muse_lightning.training.module import LanguageModel

GIB = 1024**3


@dataclass(frozen=True)
class TrainingBench:
    """What `muse bench training` times."""

    attention: tuple[Literal["recipe", "dense"], ...] = ("recipe", "dense")
    """The recipe's own attention, and its dense twin: the same recipe with Dense."""
    recompute: tuple[Recompute, ...] | None = None
    """Values of model.recompute, each timed; null is the recipe's."""
    documents: tuple[int, ...] | None = None
    """Lengths of packed documents, repeated until a row is full; null is one document in a row, without a mask."""
    warmup: int = 3
    """Steps before those that are timed."""
    steps: int = 8
    """Steps that are timed, each time."""
    rounds: int = 1
    """How often everything is timed, in turn."""
    out: Path | None = None
    """Folder to write, which must not exist; null is a new one in runs/bench."""

    def __post_init__(self) -> None:
        check_documents(self.documents)
        for name in ("warmup", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"bench.{name}: {getattr(self, name)} found, at least 1 expected")
        if not self.attention:
            raise UserError("bench.attention: nothing found, at least one of recipe, dense expected")


@dataclass(frozen=True)
class Timed:
    """What was found of one variant in one round.

    Attributes:
        attention: "recipe" or "dense".
        recompute: What is computed again in the backward pass.
        tokens: Of a step.
        steps: What they took; None where there is a reason.
        flops: Work of a step, nothing that is computed again counted.
        attention_flops: Attention's part of them.
        dense_flops: What exact attention would have to do.
        reason: Why nothing was timed.
        predicted: Memory of a step as training/memory.py predicts it, of whole rows.
    """

    attention: str
    recompute: str
    tokens: int
    flops: float
    attention_flops: float
    dense_flops: float
    steps: Steps | None = None
    reason: str | None = None
    predicted: StepMemory | None = None

    @property
    def seconds(self) -> float | None:
        """The median step."""
        return None if self.steps is None else median(self.steps.seconds)

    def record(self, peak: float | None) -> dict[str, Any]:
        """For JSON; `peak` is the device's FLOP/s."""
        found = {**asdict(self), "record": "steps"}
        found["predicted_peak_bytes"] = None if self.predicted is None else self.predicted.total
        found["measured_peak_bytes"] = None if self.steps is None else self.steps.peak_bytes
        if self.seconds is not None:
            found["tokens_per_sec"] = self.tokens / self.seconds
            if peak is not None:
                found["mfu"] = self.flops / self.seconds / peak
                found["mfu_attention"] = self.attention_flops / self.seconds / peak
                found["mfu_dense_equivalent"] = self.dense_flops / self.seconds / peak
        return found


def bench_training(verb: str, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """`muse bench training --config RECIPE [--bench.KEY=VALUE ...]`."""
    cli = MuseCLI(verb, description, args, allowed, builds="model", options=TrainingBench)
    bench = TrainingBench(**cli.config.bench.as_dict())
    folder = bench.out or Path("runs/bench") / f"{datetime.now().astimezone():%Y-%m-%d_%H%M%S}_training"
    header = result_header("cuda" if torch.cuda.is_available() else "cpu") | {
        "model": cli.config.model.as_dict(),
        "trainer": cli.config.trainer.as_dict(),
    }
    peak = half_precision_peak(header["device"])
    found = []
    with new_directory(folder, "bench.out") as temporary:
        for timed in time_variants(cli, bench):
            found.append(timed)
            print("\n".join(aligned(table(found, peak)).splitlines()[-1:]), file=sys.stderr, flush=True)
        records = [{"record": "header", **header}, *(timed.record(peak) for timed in found)]
        atomic_write(temporary / "results.jsonl", "".join(json.dumps(each, default=str) + "\n" for each in records))
        atomic_write(temporary / "results.md", _page(header, found, peak))
    print(aligned(table(found, peak)))
    print(f"{folder}: results.jsonl, results.md")


def time_variants(cli: MuseCLI, bench: TrainingBench) -> Iterator[Timed]:
    """Time every variant, in turn."""
    data, trainer = cli.config.data, cli.config.trainer.as_dict()
    for _ in range(bench.rounds):
        for attention in bench.attention:
            for recompute in bench.recompute or (cli.config.model.recompute,):
                model = make_variant(cli, attention, recompute)
                batch = random_batch(model.config.vocab_size, data.batch_size, data.seq_len, bench.documents)
                lengths = document_lengths(data.batch_size, data.seq_len, batch.get("cu_seqlens"))
                has_documents = bench.documents is not None
                tokens = sum(lengths) * trainer["accumulate_grad_batches"]
                per_token = training_flops_per_token(model.llama, lengths, has_documents=has_documents)
                of_attention = attention_flops_per_token(model.llama, lengths, has_documents=has_documents)
                dense = training_flops_per_token(model.llama, lengths, [Dense(0)])
                flops = (per_token * tokens, of_attention * tokens, dense * tokens)
                timed = Timed(attention, recompute, tokens, *flops, predicted=_predicted(model, data, trainer))
                try:
                    timed = replace(timed, steps=time_steps(model, trainer, batch, bench.warmup, bench.steps))
                except torch.OutOfMemoryError:
                    timed = replace(timed, reason="out of memory")
                # Not in the handler: the error holds on to the model that did not fit.
                del model
                gc.collect()
                yield timed


def _predicted(model: LanguageModel, data: Namespace, trainer: dict[str, Any]) -> StepMemory | None:
    """Memory of a step; None where the attention strategy lets nobody tell."""
    try:
        return step_memory(
            model,
            batch_size=data.batch_size,
            seq_len=data.seq_len,
            accumulate=trainer["accumulate_grad_batches"],
            precision=trainer["precision"],
            device_type="cuda" if torch.cuda.is_available() else "cpu",
        )
    except UserError:
        return None


def make_variant(cli: MuseCLI, attention: str, recompute: Recompute) -> LanguageModel:
    """The recipe's model, or its dense twin."""
    config = cli.config.model.clone()
    config.recompute = recompute
    config.weights = None
    if attention == "dense":
        config.attention = Namespace(class_path="muse_lightning.attention.Dense")
        config.exact_layers, config.exact_heads = (), 0
    return cli.instantiate_model(config)


def table(found: Sequence[Timed], peak: float | None) -> list[Row]:
    """A row for each variant and round."""
    mfus = {"MFU": "mfu", "of it attention": "mfu_attention", "dense-equivalent": "mfu_dense_equivalent"}
    times = ["tokens/s", "x dense", "step s", "min-max"]
    rows: list[Row] = [["attention", "recompute", *times, *mfus, "peak GiB", "predicted GiB"]]
    for timed in found:
        cells = [timed.attention, timed.recompute]
        if timed.steps is None or timed.seconds is None:
            size = None if timed.predicted is None else timed.predicted.total
            rows.append([*cells, timed.reason or NONE, *[NONE] * len(times), _gib(size)])
            continue
        twins = [t.seconds for t in found if t.attention == "dense" and t.seconds]
        record = timed.record(peak)
        rows.append(
            [
                *cells,
                f"{record['tokens_per_sec']:,.0f}",
                f"{min(twins) / timed.seconds:.2f}" if twins else NONE,
                f"{timed.seconds:.3f}",
                f"{min(timed.steps.seconds):.3f}-{max(timed.steps.seconds):.3f}",
                *(f"{record[name]:.1%}" if name in record else NONE for name in mfus.values()),
                _gib(timed.steps.peak_bytes),
                _gib(None if timed.predicted is None else timed.predicted.total),
            ]
        )
    return rows


def _gib(size: int | None) -> str:
    return NONE if size is None else f"{size / GIB:.1f}"


def _page(header: dict[str, Any], found: Sequence[Timed], peak: float | None) -> str:
    sections = [
        f"# Training steps of a recipe and its dense twin, {header['device']}",
        f"Machine: {machine_line(header)}. Commit {header['git_revision'] or 'unknown'}. {header['date']}.",
        f"    {header['command']}",
        "Whole optimizer steps of Lightning's loop on random tokens, in one process, one variant after the other: the "
        "median. `x dense`: how many times as fast as the fastest dense row. MFU: FLOPs of the step, nothing that is "
        "computed again counted, over time and the device's peak; of it attention: the part of query-key pairs; "
        "dense-equivalent: what exact attention would have had to do. Peak: of everything in memory; predicted: "
        "without compilation and libraries (training/memory.py).",
        markdown(table(found, peak)),
        "Model and trainer options, and every step's time, are in results.jsonl.",
    ]
    return "\n\n".join(sections) + "\n"
