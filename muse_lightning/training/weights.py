"""Weights from elsewhere: reading them, and saying clearly when they belong to a model of another shape."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muse_lightning.errors import UserError, shown_url
from muse_lightning.model.hf import load_pretrained
from muse_lightning.model.llama import Llama

CHECKPOINT_PREFIX = "llama."
"""What stands before Hugging Face's names in a Lightning checkpoint."""
_SHARDED_CHECKPOINT_FILE = "meta.pt"  # Lightning's, beside the shards


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict under Hugging Face's names.

    Args:
        path: a Lightning checkpoint (.ckpt), a .safetensors file, or a folder written by `save_pretrained`.
    Raises:
        UserError: nothing there, or neither of these.
    """
    if not path.exists():
        raise UserError(f"model.weights: {path} does not exist; accepted: a .ckpt, a .safetensors file or its folder")
    if path.suffix != ".ckpt":
        return load_pretrained(path)
    state = read_checkpoint(path, "model.weights")["state_dict"]
    return {name.removeprefix(CHECKPOINT_PREFIX): tensor for name, tensor in state.items()}


def read_checkpoint(path: Path, key: str) -> dict[str, Any]:
    """Content of a Lightning checkpoint, of which only tensors and plain values are unpickled; tensors stay on disk.

    Args:
        path: a file.
        key: the option that names it, for the message.
    Raises:
        UserError: it is not a whole checkpoint, or holds something else that is pickled.
    """
    what = f"{key}: {path} is not a Lightning checkpoint of tensors"
    if not zipfile.is_zipfile(path):
        raise UserError(f"{what}: not a whole file of torch.save")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what}: {reason}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{what}: it has no state_dict")
    return checkpoint


def check_checkpoint(path: str, for_training: bool, max_steps: int = -1) -> None:
    """Refuse what cannot be resumed from before a run is made for it. Weights of another architecture show later, in
    `check_shapes`.

    Args:
        path: value of --ckpt_path: a file, or the folder of a sharded checkpoint.
        for_training: whether the optimizer's state is needed too.
        max_steps: where training shall end; -1: nowhere.
    Raises:
        UserError: an address (Lightning would unpickle whatever came from there), nothing there, no checkpoint, or one
            that is not before `max_steps`.
    """
    expected = "expected the path of a local checkpoint"
    if "://" in path:
        raise UserError(f"ckpt_path: {shown_url(path)} is an address; {expected}")
    if not Path(path).exists():
        raise UserError(f"ckpt_path: no checkpoint at {path}; {expected}")
    if Path(path).is_dir():
        if not (Path(path) / _SHARDED_CHECKPOINT_FILE).is_file():
            raise UserError(f"ckpt_path: {path} is a folder without {_SHARDED_CHECKPOINT_FILE}; {expected}")
        return
    needed = ["pytorch-lightning_version", *(["optimizer_states", "lr_schedulers"] if for_training else [])]
    checkpoint = read_checkpoint(Path(path), "ckpt_path")
    missing = [name for name in needed if name not in checkpoint]
    if missing:
        raise UserError(
            f"ckpt_path: {path} has no {', '.join(missing)}; give it as model.weights to start from its weights alone"
        )
    step = checkpoint.get("global_step", 0)
    if not isinstance(step, int) or step < 0:
        found = " ".join(repr(step).split())[:80]
        raise UserError(
            f"ckpt_path: {path} is of step {found}, a number of at least 0 expected; give another checkpoint"
        )
    if for_training and 0 <= max_steps <= step:
        raise UserError(
            f"trainer.max_steps: {max_steps} found, but ckpt_path {path} is of step {step}: nothing is left to train; "
            f"give more than {step}"
        )


def load_weights(llama: Llama, path: Path) -> None:
    """Replace every parameter of `llama` by what `read_weights` finds at `path`.

    Raises:
        UserError: nothing readable there, or it belongs to a model of another shape.
    """
    state = read_weights(path)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if llama.config.tie_word_embeddings and embedding in state:
        # Hugging Face leaves the head of a tied model out.
        if head in state and not torch.equal(state[head], state[embedding]):
            raise UserError(f"{path} has a head of its own: config.tie_word_embeddings is true; accepted: false")
        state[head] = state[embedding]
    check_shapes(llama.state_dict(), state, str(path))
    llama.load_state_dict(state)


def check_shapes(model: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights of another architecture, with the first tensor that tells.

    Args:
        model: state dict of the model.
        found: state dict to be loaded into it.
        source: where `found` comes from, for the message.
    Raises:
        UserError: a tensor is missing, of another shape, or not the model's.
    """
    for name, tensor in model.items():
        if name not in found:
            raise UserError(f"{source} has no tensor {name}; the model of this recipe needs it, {_shape(tensor)}")
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{source} is of another shape: {name} is {_shape(found[name])} there, {_shape(tensor)} in this recipe"
            )
    for name, tensor in found.items():
        if name not in model:
            raise UserError(f"{source} has a tensor {name}, {_shape(tensor)}, which the model of this recipe lacks")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
