"""A model as a Hugging Face folder that transformers 4 and 5 load without code of its own: what import and export
write."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from muse_lightning.errors import UserError, reason_of
from muse_lightning.files import atomic_write
from muse_lightning.model.hf import config_to_hf
from muse_lightning.pretrained.reference import HF_CONFIG_FILE, ModelReference
from muse_lightning.pretrained.tensors import EMBEDDING, HEAD, INDEX_SUFFIX, SAFETENSORS_FILE, TensorStore
from muse_lightning.pretrained.tokenizer_files import (
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    check_vocabulary,
    folder_token_ids,
    tokenizer_files,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["float32", "bfloat16", "float16"]
SHARD_BYTES = 1 << 30
"""Of a file of weights, which is held in memory when it is written."""
CAST_BYTES = 1 << 24
"""Of a tensor that is read at once when its dtype changes."""
_GENERATION_FILE = "generation_config.json"


def write_model(model: ModelReference, folder: Path, dtype: DtypeName | None = None) -> None:
    """Write config.json, weights in shards, tokenizer files and generation_config.json, tensor by tensor.

    Args:
        model: where from.
        folder: an empty folder.
        dtype: of the weights; None: each as it is stored.
    Raises:
        UserError: no architecture of transformers has the model's features, the tokenizer has ids that the model lacks,
            or there is no room.
    """
    described = config_to_hf(model.config)
    files, ids = _tokenizer(model)
    described |= {"torch_dtype": dtype or _name(model.tensors.dtype(EMBEDDING))}
    # Not pad_token_id: transformers gives the embedding of that id no gradient.
    described |= {
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": ids.get("eos_token_id"),
        "pad_token_id": None,
    }
    check_room(sum(_sizes(model, dtype).values()), folder)
    _write_json(folder / HF_CONFIG_FILE, described)
    for name, content in files.items():
        atomic_write(folder / name, content)
    if _GENERATION_FILE not in files:
        _write_json(folder / _GENERATION_FILE, {name: number for name, number in ids.items() if number is not None})
    write_weights(model, folder, dtype)


def write_weights(model: ModelReference, folder: Path, dtype: DtypeName | None) -> None:
    """Write model.safetensors, or shards of it and their index; a head that is the embedding is left out."""
    dtypes = {name: DTYPES[dtype] if dtype else model.tensors.dtype(name) for name in model.tensors}
    sizes = _sizes(model, dtype)
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern=SAFETENSORS_FILE.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=SHARD_BYTES,
    )
    for file, names in plan.filename_to_tensors.items():
        _write_shard(folder / file, {name: converted(model.tensors, name, dtypes[name]) for name in names})
        # The library makes its files readable for their owner alone.
        shutil.copymode(folder / HF_CONFIG_FILE, folder / file)
    if plan.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": plan.tensor_to_filename}
        _write_json(folder / (SAFETENSORS_FILE + INDEX_SUFFIX), index)


def _write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # A function of its own, so that no name holds one shard while the next is made.
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"output: cannot write {file.name}: {reason_of(error)}") from error


def converted(tensors: TensorStore, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype; in its own as it is.

    Raises:
        UserError: a finite value is infinite in that dtype.
    """
    if tensors.dtype(name) == dtype:
        return tensors[name].contiguous()
    made = torch.empty(tensors.shape(name), dtype=dtype)
    flat = made.view(-1)
    step = CAST_BYTES // tensors.dtype(name).itemsize
    for start in range(0, len(flat), step):
        # Read anew each time: the pages of a mapped file stay in memory as long as its tensor does.
        part = tensors[name].contiguous().view(-1)[start : start + step]
        target = flat[start : start + step].copy_(part)
        # Without a copy, which the exact test makes.
        is_bounded = all(bound.isfinite() for bound in target.aminmax())
        if not is_bounded and (lost := part.isfinite() & ~target.isfinite()).any():
            largest = part[lost].abs().max().item()
            raise UserError(
                f"dtype: {name} has a value of {largest:.4g}, which is infinite in {_name(dtype)} (up to "
                f"{torch.finfo(dtype).max:.4g}); without dtype it stays {_name(tensors.dtype(name))}"
            )
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(model: ModelReference, dtype: DtypeName | None) -> dict[str, int]:
    """Bytes of each tensor that is written."""
    return {
        name: model.tensors.shape(name).numel() * (DTYPES[dtype] if dtype else model.tensors.dtype(name)).itemsize
        for name in model.tensors
        if not (name == HEAD and model.config.tie_word_embeddings)
    }


def check_room(needed: int, folder: Path) -> None:
    """Refuse to write so many bytes where they do not fit.

    Raises:
        UserError: they do not.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"output: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free; give a folder with room"
        )


def _tokenizer(model: ModelReference) -> tuple[dict[str, bytes | str], dict[str, Any]]:
    """Files of the tokenizer by name, and ids of the special tokens by transformers' names."""
    if model.is_run:
        tokenizer = model.load_tokenizer()
        assert tokenizer is not None
        return tokenizer_files(tokenizer, model.config)
    found = [model.folder / name for name in (*TOKENIZER_FILES, _GENERATION_FILE)]
    files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in found if path.is_file()}
    if TOKENIZER_FILE in files:
        check_vocabulary(model.folder / TOKENIZER_FILE, model.config)
    return files, folder_token_ids(model.folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(content, indent=2) + "\n")
