"""The transformer as one device sees it."""

from muse_lightning.model.config import LlamaConfig, RopeScaling
from muse_lightning.model.llama import Llama
from muse_lightning.model.presets import load_preset, preset_path

__all__ = ["Llama", "LlamaConfig", "RopeScaling", "load_preset", "preset_path"]
