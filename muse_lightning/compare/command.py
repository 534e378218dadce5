"""`muse compare`: its options, the order of its work, and the files that it writes."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from muse_kernels.attention.options import MuseOptions
from muse_lightning.compare import costs
from muse_lightning.compare.activations import OnActivations, middle_layer, on_activations
from muse_lightning.compare.blocks import Blocks, read_blocks
from muse_lightning.compare.figure import draw
from muse_lightning.compare.gradients import gradient_cosines
from muse_lightning.compare.losses import losses
from muse_lightning.compare.report import page, table
from muse_lightning.compare.results import Found, cheapest, least_rising, overlay, to_json
from muse_lightning.compare.settings import Grid, Setting, make_settings
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_directory, atomic_write
from muse_lightning.measure.bench.report import aligned
from muse_lightning.measure.bench.timing import CudaInstruments, Instruments
from muse_lightning.measure.info import environment
from muse_lightning.model.llama import Llama
from muse_lightning.pretrained.reference import ModelReference, open_model

OVERLAY_NAME = "recommended.yaml"
DEFAULT_MUSE = MuseOptions()
DEFAULT_GRID = Grid()
_TIMED_RUNS, _TIMED_SECONDS = 10, 0.5


def compare(
    model: Path,
    data: Path,
    split: str = "val",
    seq_len: int = 32768,
    blocks: int = 8,
    document_mask: bool = True,
    muse: MuseOptions = DEFAULT_MUSE,
    window: int | None = None,
    detailed_blocks: int = 1,
    gradients: bool = True,
    sweep: bool = False,
    grid: Grid = DEFAULT_GRID,
    max_loss_increase: float = 0.01,
    loss_chunk: int = 2048,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    out: Path | None = None,
) -> None:
    """Evaluate one model with exact attention, MuSe, spatial blocks and a sliding window, without training it.

    Writes compare.json, compare.md and compare.png; after a sweep also recommended.yaml, the second --config of a
    recipe.

    Args:
        model: A Hugging Face folder, a run folder or a .ckpt of one.
        data: A prepared dataset, made with the model's tokenizer.
        split: Its split.
        seq_len: Tokens of a block.
        blocks: Blocks, spread evenly over the split.
        document_mask: Whether documents in a block are told apart; false for a model that was trained without.
        muse: Options of MuSe; the spatial blocks have the same sizes and retrieve as many keys.
        window: Tokens that the sliding window sees; null is MuSe's chunk.
        detailed_blocks: Blocks on which the error of each head and the mass are measured, at least 1.
        gradients: Measure how the loss's gradient agrees with exact attention's, on one block.
        sweep: Try a grid of MuSe's options, and recommend the cheapest that keeps the loss.
        grid: The options that a sweep tries.
        max_loss_increase: Nats per token by which the loss may rise, two standard errors included.
        loss_chunk: Tokens whose logits exist at once.
        device: auto is the GPU where there is one.
        dtype: Of weights and activations; auto is bfloat16 on a GPU, else float32.
        out: Folder to write, which must not exist; null is a new one in runs/compare.
    """
    counts = {"seq_len": seq_len, "blocks": blocks, "detailed_blocks": detailed_blocks, "loss_chunk": loss_chunk}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}: {value} found, at least 1 expected")
    reference = open_model(model)
    if seq_len > reference.config.max_position_embeddings:
        raise UserError(
            f"seq_len: {seq_len} found; {model} is meant for at most {reference.config.max_position_embeddings} tokens"
        )
    vocab_size = reference.config.vocab_size
    read = read_blocks(data, split, seq_len, blocks, document_mask, vocab_size)
    settings = make_settings(
        muse, muse.chunk if window is None else window, reference.config.sliding_window, grid if sweep else None
    )
    place = _device(device)
    folder = _new_folder(out)
    header = _header(reference, data, read, split, seq_len, document_mask, _dtype(dtype, place))
    llama = reference.load(device=place, dtype=getattr(torch, header["dtype"]))
    instruments = CudaInstruments(_TIMED_RUNS, _TIMED_SECONDS) if place == "cuda" else None
    found = measure(llama, read, settings, detailed_blocks, gradients, loss_chunk, instruments)
    recommended = cheapest(found, max_loss_increase) if sweep else None
    advice = _advice(found, recommended, max_loss_increase, folder) if sweep else None
    with atomic_directory(folder) as temporary:
        atomic_write(temporary / "compare.json", to_json(header, found, recommended))
        atomic_write(temporary / "compare.md", page(header, found, advice))
        atomic_write(temporary / "compare.png", draw(found, f"{model}, {seq_len:,} tokens, {header['device']}"))
        if recommended is not None:
            atomic_write(temporary / OVERLAY_NAME, overlay(recommended, header))
    print(aligned(table(found)))
    if advice:
        print(advice)
    print(f"{folder}: compare.json, compare.md, compare.png{f', {OVERLAY_NAME}' if recommended else ''}")


def measure(
    llama: Llama,
    blocks: Blocks,
    settings: Sequence[Setting],
    detailed_blocks: int,
    gradients: bool,
    loss_chunk: int,
    instruments: Instruments | None,
) -> list[Found]:
    """Measure every setting, exact attention, which comes first, before the others.

    Args:
        llama: with exact attention, where it shall run.
        instruments: None: nothing is timed.
    """
    exact, main = settings[0], [setting for setting in settings if not setting.is_swept]
    by_name = {}
    for setting in settings:
        with llama.attention_as(setting.attention):
            by_name[setting.name] = losses(llama, blocks, loss_chunk)
        _say(f"{setting.name}: loss {by_name[setting.name].mean:.4f}")
    _say("error and mass of each head")
    with_mass = [setting.name for setting in main if setting.muse is not None]
    detailed = on_activations(llama, blocks.batches[:detailed_blocks], settings[1:], with_mass)
    attention_ms: dict[str, float] = {}
    forward_ms: dict[str, float] = {}
    if instruments is not None:
        _say("times")
        layer = llama.config.num_hidden_layers // 2
        times = costs.attention_times(settings, middle_layer(llama, blocks.batches[0]), layer, instruments)
        attention_ms = {name: timing.median_ms for name, timing in times.items()}
        times = costs.forward_times(llama, main, blocks.batches[0], instruments)
        forward_ms = {name: timing.median_ms for name, timing in times.items()}
    cosines: dict[str, float] = {}
    if gradients:
        _say("gradients")
        cosines = gradient_cosines(llama, blocks.batches[0], exact, main[1:], loss_chunk)
    exact_pairs = costs.pairs(exact, blocks.batches)
    found = []
    for setting in settings:
        own = by_name[setting.name]
        result = Found(setting, own, own.rise(by_name[exact.name]), costs.pairs(setting, blocks.batches) / exact_pairs)
        result = replace(
            result,
            gradient_cosine=cosines.get(setting.name),
            attention_ms=attention_ms.get(setting.name),
            forward_ms=forward_ms.get(setting.name),
            **_as_lists(detailed.get(setting.name)),
        )
        found.append(result)
    return found


def _as_lists(found: OnActivations | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {"errors": found.errors.tolist(), "mass": None if found.mass is None else found.mass.tolist()}


def _advice(found: Sequence[Found], recommended: Found | None, max_loss_increase: float, folder: Path) -> str:
    if recommended is None:
        nearest = least_rising(found)
        return (
            f"No MuSe setting keeps the rise of the loss, two standard errors included, under {max_loss_increase}; the "
            f"least is {nearest.highest_rise:.4f}, of {nearest.setting.name}."
        )
    rise, _ = recommended.rise
    return (
        f"The cheapest MuSe setting under a rise of {max_loss_increase}, two standard errors included: "
        f"{recommended.setting.name} ({rise:+.4f}). "
        f"Train with it: muse fit --config RECIPE --config {folder / OVERLAY_NAME}"
    )


def _header(
    reference: ModelReference,
    data: Path,
    blocks: Blocks,
    split: str,
    seq_len: int,
    document_mask: bool,
    dtype: str,
) -> dict[str, Any]:
    found = environment()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["muse", *sys.argv[1:]]),
        "device": found["devices"][torch.cuda.current_device() if torch.cuda.is_available() else 0],
        **found,
        "model": str(reference.path),
        "data": str(data),
        "split": split,
        "fingerprint": blocks.card.fingerprint,
        "blocks": list(blocks.indices),
        "labels": sum(blocks.labels()),
        "seq_len": seq_len,
        "document_mask": document_mask,
        "dtype": dtype,
    }


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda found, but PyTorch sees no GPU; accepted here: auto, cpu")
    return name


def _dtype(name: str, device: str) -> str:
    if name == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    return name


def _new_folder(out: Path | None) -> Path:
    """A folder that does not exist yet.

    Raises:
        UserError: it exists, or its parent cannot be made.
    """
    if out is None:
        out = Path("runs/compare") / f"{datetime.now().astimezone():%Y-%m-%d_%H%M%S}"
    if out.exists():
        raise UserError(f"out: {out} exists; give a folder that does not")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: cannot write in {out.parent}: {error.strerror}") from None
    return out


def _say(what: str) -> None:
    print(f"compare: {what}", file=sys.stderr, flush=True)
