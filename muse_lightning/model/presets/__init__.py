"""Architectures by name: one YAML of LlamaConfig fields each, packaged beside this file."""

from pathlib import Path
from typing import Any

import yaml

from muse_lightning.errors import UserError, suggestion
from muse_lightning.model.config import LlamaConfig, RopeScaling


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The YAML file of a preset.

    Raises:
        UserError: there is no such preset.
    """
    if name not in preset_names():
        raise UserError(f"preset {name!r} does not exist{suggestion(name, preset_names())}")
    return Path(__file__).parent / f"{name}.yaml"


def load_preset(name: str, **overrides: Any) -> LlamaConfig:
    """The architecture of a preset, with some fields replaced.

    Raises:
        UserError: there is no such preset.
    """
    fields = yaml.safe_load(preset_path(name).read_text())
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return LlamaConfig(**(fields | overrides))
