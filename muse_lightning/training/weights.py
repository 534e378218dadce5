"""Weights to start from and checkpoints to go on from; and saying clearly when they belong to another model."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from muse_lightning.checkpoints.choice import report, stored
from muse_lightning.checkpoints.manifest import CHECKPOINT_SUFFIX, MANIFEST_SUFFIX, manifest_path, problem_of
from muse_lightning.errors import UserError, shown_url
from muse_lightning.files import expand_home
from muse_lightning.model.llama import Llama
from muse_lightning.pretrained.reference import copy_weights, known_config, open_weights
from muse_lightning.pretrained.run_folder import SHARDS_FILE, is_sharded
from muse_lightning.pretrained.tensors import TensorStore, check_shapes, load_pickle

_SHAPELESS = ("rope_theta", "rope_scaling", "rms_norm_eps", "sliding_window")


def read_checkpoint(path: Path, key: str) -> dict[str, Any]:
    """Content of a Lightning checkpoint, of which only tensors and plain values are unpickled; tensors stay on disk.

    Args:
        path: a file.
        key: the option that names it, for the message.
    Raises:
        UserError: it is not a whole checkpoint, or holds something else that is pickled.
    """
    wanted = "a Lightning checkpoint of tensors"
    try:
        checkpoint = load_pickle(path, wanted)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{key}: {path} is not {wanted}: it has no state_dict")
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
    expected = "expected the path of a local checkpoint, last, or best"
    if "://" in path:
        raise UserError(f"ckpt_path: {shown_url(path)} is an address; {expected}")
    if not os.path.exists(path):  # false also of what can be no path, where pathlib raises
        raise UserError(f"ckpt_path: no checkpoint at {path}; {expected}")
    if Path(path).is_dir():
        if not is_sharded(Path(path)):
            checkpoints = stored(Path(path) / "checkpoints")
            nearest = f"; nearest: {checkpoints[0][1]}" if checkpoints else ""
            raise UserError(f"ckpt_path: {path} is a folder without {SHARDS_FILE}; {expected}{nearest}")
        return
    if path.endswith(MANIFEST_SUFFIX):
        meant = path.removesuffix(MANIFEST_SUFFIX) + CHECKPOINT_SUFFIX
        raise UserError(f"ckpt_path: {path} is the manifest of a checkpoint; expected the checkpoint, {meant}")
    _check_manifest(Path(path))
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


@rank_zero_only
def _check_manifest(path: Path) -> None:
    """Refuse a checkpoint that has changed since it was saved; say so if that cannot be known."""
    if not manifest_path(path).exists():
        report(f"ckpt_path: warning: {path} has no {manifest_path(path).name}: whether it is damaged cannot be known")
        return
    problem = problem_of(path)
    if problem is not None:
        raise UserError(f"ckpt_path: {path} is damaged: {problem}; give another checkpoint, or last")


def check_weights(llama: Llama, path: Path) -> TensorStore:
    """Open weights and compare their shapes with those of a model, on any device, without reading them.

    Args:
        path: what `model.weights` accepts.
    Raises:
        UserError: nothing readable there, or it belongs to a model of another shape.
    """
    tensors = open_weights(expand_home(path), "model.weights")
    if llama.config.tie_word_embeddings:
        tensors = tensors.tied(str(path))
    check_shapes({name: tensor.shape for name, tensor in llama.state_dict().items()}, tensors.shapes(), str(path))
    return tensors


def load_weights(llama: Llama, path: Path) -> list[str]:
    """Replace every parameter of `llama`, tensor by tensor, by the weights at `path`.

    Args:
        path: a model reference (pretrained/reference.py), a .safetensors file or a folder of them.
    Returns:
        One line for each number of the architecture that differs and that no shape shows.
    Raises:
        UserError: nothing readable there, or it belongs to a model of another shape; no parameter has changed.
    """
    copy_weights(llama, check_weights(llama, path))
    trained, recipe = known_config(expand_home(path)), llama.config
    return [
        f"model.config.{name}: {getattr(trained, name)} at {path}, {getattr(recipe, name)} in this recipe, which wins"
        for name in _SHAPELESS
        if trained is not None and getattr(trained, name) != getattr(recipe, name)
    ]
