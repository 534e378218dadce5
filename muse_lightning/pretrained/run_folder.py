"""What a run folder says of its model: the configuration, the newest checkpoint, the weights in it."""

from pathlib import Path
from typing import Any

import yaml

from muse_lightning.bounded_yaml import load_bounded
from muse_lightning.checkpoints.choice import has_manifest, last_checkpoint, step_of, stored
from muse_lightning.errors import UserError
from muse_lightning.model.config import LlamaConfig, RopeScaling
from muse_lightning.pretrained.tensors import TensorStore, open_pickle

CHECKPOINT_PREFIX = "llama."
"""What stands before Hugging Face's names in a Lightning checkpoint."""
CONFIG_FILE = "config.yaml"
SHARDS_FILE = "meta.pt"
"""What Lightning writes beside the shards of a checkpoint."""


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run of the highest step that is whole; damaged ones are named on standard error. Where none
    has a manifest, that of the highest step in its name.

    Raises:
        UserError: there is none, or it is in shards.
    """
    checkpoints = folder / "checkpoints"
    if has_manifest(checkpoints):
        whole = last_checkpoint(checkpoints)
        if whole is None:
            raise UserError(f"{folder} is a run without a checkpoint that is whole")
        return whole
    every = [path for _, path in stored(checkpoints)]
    files = [path for path in every if path.is_file()]
    found = [path for path in every if path in files or is_sharded(path)]
    if not found:
        raise UserError(f"{folder} is a run without a checkpoint: no file {checkpoints / '*.ckpt'}")
    if found[0] not in files:
        older = f", such as the older {files[0]}" if files else ""
        raise UserError(f"{found[0]} is a checkpoint in shards; accepted: a checkpoint in one file{older}")
    return found[0]


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (path / SHARDS_FILE).is_file()


def open_checkpoint(path: Path) -> TensorStore:
    """Weights of a Lightning checkpoint of this project.

    Raises:
        UserError: it is not whole, holds something else than tensors and plain values, or has no weights.
    """
    tensors = open_pickle(path, key="state_dict", wanted="a Lightning checkpoint of tensors")
    return tensors.without_prefix(CHECKPOINT_PREFIX)


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in.

    Raises:
        UserError: it lies in none.
    """
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"{checkpoint} lies in no run folder, so its architecture is not known: no {CONFIG_FILE} beside it or above"
    )


def configuration_behind(checkpoint: Path) -> dict[str, Any]:
    """The configuration by which a checkpoint was trained: that of the last start of its run before it.

    Raises:
        UserError: it lies in no run folder, or that is not YAML of a run.
    """
    folder, step = run_of(checkpoint), step_of(checkpoint)
    resumed = resumed_configurations(folder)
    before = [start for start in resumed if start < step]
    return run_configuration(folder, resumed[max(before)] if before else CONFIG_FILE)


def resumed_configurations(folder: Path) -> dict[int, str]:
    """Names of the configurations of a run's later starts, by the step that each went on from, in order."""
    steps = {path.name[12:-5]: path.name for path in folder.glob("config.step=*.yaml")}
    return dict(sorted((int(step), name) for step, name in steps.items() if step.isdecimal()))


def run_configuration(folder: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """Content of a run's config.yaml.

    Raises:
        UserError: it is not YAML of a run.
    """
    path = folder / name
    try:
        found = load_bounded(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise UserError(f"{path} is not the configuration of a run: it has no `model:`")
    return found


def run_architecture(folder: Path) -> LlamaConfig:
    """The architecture that a run was started with.

    Raises:
        UserError: config.yaml has none, or one that is not accepted.
    """
    fields = run_configuration(folder)["model"].get("config")
    try:
        fields = dict(fields)
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return LlamaConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: model.config is not an architecture: {error}") from None
