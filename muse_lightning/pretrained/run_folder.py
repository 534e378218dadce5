"""What a run folder says of its model: the configuration, the newest checkpoint, the weights in it."""

from pathlib import Path
from typing import Any

import yaml

from muse_lightning.errors import UserError
from muse_lightning.model.config import LlamaConfig, RopeScaling
from muse_lightning.pretrained.tensors import TensorStore, open_pickle

CHECKPOINT_PREFIX = "llama."
"""What stands before Hugging Face's names in a Lightning checkpoint."""
CONFIG_FILE = "config.yaml"
SHARDS_FILE = "meta.pt"
"""What Lightning writes beside the shards of a checkpoint."""


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run that was written last.

    Raises:
        UserError: there is none, or it is in shards.
    """
    every = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    files = [path for path in every if path.is_file()]
    found = [path for path in every if path in files or is_sharded(path)]
    if not found:
        raise UserError(f"{folder} is a run without a checkpoint: no file {folder / 'checkpoints' / '*.ckpt'}")
    if found[-1] not in files:
        older = f", such as the older {files[-1]}" if files else ""
        raise UserError(f"{found[-1]} is a checkpoint in shards; accepted: a checkpoint in one file{older}")
    return found[-1]


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


def run_configuration(folder: Path) -> dict[str, Any]:
    """Content of a run's config.yaml.

    Raises:
        UserError: it is not YAML of a run.
    """
    path = folder / CONFIG_FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
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
