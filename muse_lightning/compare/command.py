"""`muse compare`: its options, the order of its work, and the files that it writes."""

from datetime import datetime
from pathlib import Path
from typing import Literal

import torch

from muse_kernels.attention.options import MuseOptions
from muse_lightning.compare.blocks import check_tokenizer, read_blocks
from muse_lightning.compare.figure import draw
from muse_lightning.compare.measuring import measure
from muse_lightning.compare.report import advice, page, table
from muse_lightning.compare.results import cheapest, overlay, to_json
from muse_lightning.compare.settings import Grid, make_settings
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_write, new_directory
from muse_lightning.measure.bench.report import aligned
from muse_lightning.measure.bench.timing import CudaInstruments
from muse_lightning.measure.info import result_header
from muse_lightning.pretrained.reference import ModelReference, open_model
from muse_lightning.pretrained.run_folder import run_configuration

OVERLAY_NAME = "recommended.yaml"
DEFAULT_MUSE = MuseOptions()
DEFAULT_GRID = Grid()
_SEQ_LEN = 32768
_TIMED_RUNS, _TIMED_SECONDS = 10, 0.5


def compare(
    model: Path,
    data: Path,
    split: str = "val",
    seq_len: int | None = None,
    blocks: int = 8,
    document_mask: bool | None = None,
    muse: MuseOptions = DEFAULT_MUSE,
    window: int | None = None,
    exact_layers: tuple[int, ...] | None = None,
    exact_heads: int | None = None,
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

    Writes compare.json, compare.md and compare.png; after a sweep also recommended.yaml, the last --config of a
    recipe.

    Args:
        model: A Hugging Face folder, a run folder or a .ckpt of one.
        data: A prepared dataset, made with the model's tokenizer.
        split: Its split.
        seq_len: Tokens of a block; null is 32768, or as many as the model is meant for where these are fewer.
        blocks: Blocks, spread evenly over the split.
        document_mask: Whether documents in a block are told apart; null is as a run was trained, and false for others.
        muse: Options of MuSe; the spatial blocks have the same sizes and retrieve as many keys.
        window: Tokens that the sliding window sees; null is MuSe's chunk.
        exact_layers: MuSe and its baselines are evaluated once more with these layers exact, as model.exact_layers of
            a recipe has them; not if neither layers nor heads are exact, nor if all are. null is the first.
        exact_heads: In that, so many key-value heads of the other layers are exact as well, as model.exact_heads of a
            recipe has them: for each of the three those whose error adds most to the residual stream, on a block that
            is not evaluated, or on the first where the split has no other. null is as many as a layer has where
            exact_layers and grid.exact_layers are null too and there are more than two layers, else none.
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
        if value is not None and value < 1:
            raise UserError(f"{name}: {value} found, at least 1 expected")
    if grid != DEFAULT_GRID and not sweep:
        raise UserError("grid: it is used by a sweep alone; give --sweep true too")
    reference = open_model(model)
    config = reference.config
    if seq_len is None:
        seq_len = min(_SEQ_LEN, config.max_position_embeddings)
    if seq_len > config.max_position_embeddings:
        raise UserError(
            f"seq_len: {seq_len} found; {model} is meant for at most {config.max_position_embeddings} tokens"
        )
    if exact_heads is None:
        is_default = exact_layers is None and grid.exact_layers is None and config.num_hidden_layers > 2
        exact_heads = config.num_key_value_heads if is_default else 0
    if document_mask is None:
        document_mask = _was_trained_with_documents(reference)
    read = read_blocks(data, split, seq_len, blocks, document_mask, config.vocab_size)
    check_tokenizer(data, reference.load_tokenizer(), str(model))
    settings = make_settings(
        muse,
        muse.chunk if window is None else window,
        config.sliding_window,
        grid if sweep else None,
        config.num_hidden_layers,
        config.num_key_value_heads,
        (0,) if exact_layers is None else exact_layers,
        exact_heads,
    )
    place = _device(device)
    precision = _dtype(dtype, place)
    header = result_header(place) | {
        "model": str(model),
        "data": str(data),
        "split": split,
        "fingerprint": read.card.fingerprint,
        "blocks": list(read.indices),
        "exact_heads_chosen_on": read.other_index if any(each.exact_heads for each in settings) else None,
        "labels": sum(read.labels()),
        "seq_len": seq_len,
        "document_mask": document_mask,
        "dtype": precision,
    }
    folder = out or Path("runs/compare") / f"{datetime.now().astimezone():%Y-%m-%d_%H%M%S}"
    with new_directory(folder, "out") as temporary:
        try:
            found = measure(
                reference.load(device=place, dtype=getattr(torch, precision)),
                read,
                settings,
                detailed_blocks=detailed_blocks,
                gradients=gradients,
                loss_chunk=loss_chunk,
                instruments=CudaInstruments(_TIMED_RUNS, _TIMED_SECONDS) if place == "cuda" else None,
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of GPU memory; next: lower loss_chunk (now {loss_chunk}) or seq_len (now {seq_len}), or "
                "--device cpu"
            ) from None
        recommended = cheapest(found, max_loss_increase) if sweep else None
        said = advice(found, recommended, max_loss_increase, folder / OVERLAY_NAME, is_sweep=sweep)
        atomic_write(temporary / "compare.json", to_json(header, found, recommended))
        atomic_write(temporary / "compare.md", page(header, found, said))
        atomic_write(
            temporary / "compare.png", draw(found, recommended, f"{model}, {seq_len:,} tokens, {header['device']}")
        )
        if recommended is not None:
            atomic_write(temporary / OVERLAY_NAME, overlay(recommended, header))
    print("\n".join([aligned(table(found)), *said]))
    print(f"{folder}: compare.json, compare.md, compare.png{f', {OVERLAY_NAME}' if recommended else ''}")


def _was_trained_with_documents(reference: ModelReference) -> bool:
    """What a run's configuration says; others are seldom."""
    if not reference.is_run:
        return False
    return bool((run_configuration(reference.folder).get("data") or {}).get("document_mask", True))


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
