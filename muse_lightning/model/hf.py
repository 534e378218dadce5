"""Configuration and weights to and from Hugging Face's formats. `llama.py` knows nothing of it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from muse_lightning.errors import UserError
from muse_lightning.model.config import LlamaConfig, RopeScaling

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


def config_from_hf(fields: dict[str, Any]) -> LlamaConfig:
    """LlamaConfig from the content of a Hugging Face `config.json`, of transformers 4 or 5.

    Raises:
        UserError: the model is no Llama, or has a feature that this implementation lacks.
    """
    # transformers 5 keeps all of RoPE in one dictionary, transformers 4 spread it over two keys.
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", fields.get("rope_theta", 10_000.0))
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    accepted = {
        "model_type": (fields.get("model_type"), "llama"),
        "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
        "attention_bias": (fields.get("attention_bias", False), False),
        "mlp_bias": (fields.get("mlp_bias", False), False),
    }
    for name, (found, wanted) in accepted.items():
        if found != wanted:
            raise UserError(f"config.json: {name} is {found!r}; accepted: {wanted!r}")
    if rope_type not in ("default", "llama3"):
        raise UserError(f"config.json: rope_type is {rope_type!r}; accepted: default, llama3")
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=fields["num_attention_heads"],
        num_key_value_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
        head_dim=fields.get("head_dim"),
        max_position_embeddings=fields["max_position_embeddings"],
        rms_norm_eps=fields["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=RopeScaling(**rope) if rope_type == "llama3" else None,
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        initializer_range=fields.get("initializer_range", 0.02),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Content of a `config.json` that transformers 4 and 5 read as the same architecture."""
    return asdict(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": config.attention_head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def load_pretrained(path: Path) -> dict[str, Tensor]:
    """State dict of a `.safetensors` file, or of a folder with `model.safetensors` or its sharded form.

    Raises:
        UserError: nothing there, not readable as safetensors, or an index that is broken or names files elsewhere.
    """
    files = [path]
    if path.is_dir():
        if (path / _INDEX_FILE).is_file():
            files = [path / name for name in _shard_names(path / _INDEX_FILE)]
        else:
            files = [path / _SINGLE_FILE]
    state: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"no weights at {file}; accepted: a .safetensors file or a folder with {_SINGLE_FILE}")
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is not readable as safetensors: {error}") from None
    return state


def _shard_names(index: Path) -> list[str]:
    """Names of the files that an index lists, which lie in its own folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors files: {type(error).__name__}: {error}") from None
    if outside:
        raise UserError(f"{index} names the file {outside[0]!r}; accepted: names of files in its own folder")
    return names
