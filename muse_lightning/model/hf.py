"""LlamaConfig to and from Hugging Face's `config.json`. `llama.py` knows nothing of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from muse_lightning.errors import UserError
from muse_lightning.model.config import ROPE_TYPES, LlamaConfig, RopeScaling

# What transformers takes for a key that is not there; all else that is used must be.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
MODEL_TYPES = tuple(_DEFAULTS)
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Keys that change what is computed, with the one value at which they do not.
_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "num_experts": 0,
    "num_local_experts": 0,
    "no_rope_layers": None,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
# Of what a tensor's size is computed from, and of any other number.
_LARGEST = {int: 1 << 30, float: 1e300}
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
}


def config_from_hf(fields: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
    """LlamaConfig from the content of a Hugging Face `config.json`, of transformers 4 or 5.

    Args:
        fields: of model type llama, mistral, qwen2 or qwen3.
        source: where they come from, for messages.
    Raises:
        UserError: another architecture, or one with a feature that this implementation lacks.
    """
    if not isinstance(fields, Mapping):
        raise UserError(f"{source} holds no configuration; expected keys with values")
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{source}: model_type is {_shown(model_type)}; accepted: {', '.join(MODEL_TYPES)}")
    fields = _DEFAULTS[model_type] | dict(fields)
    _check_features(fields, model_type, source)
    has_bias = model_type in ("llama", "qwen3") and bool(fields.get("attention_bias"))
    numbers = {name: _number(fields, name, source) for name in (*_SIZES, "max_position_embeddings")}
    heads = fields.get("num_key_value_heads")
    try:
        return LlamaConfig(
            **numbers,
            num_key_value_heads=numbers["num_attention_heads"]
            if heads is None
            else _number(fields, "num_key_value_heads", source),
            head_dim=None if fields.get("head_dim") is None else _number(fields, "head_dim", source),
            rms_norm_eps=_number({"rms_norm_eps": 1e-6} | fields, "rms_norm_eps", source, float),
            initializer_range=_number({"initializer_range": 0.02} | fields, "initializer_range", source, float),
            rope_theta=_rope_theta(fields, source),
            rope_scaling=_rope_scaling(fields, source),
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
            attention_bias=has_bias or model_type == "qwen2",
            attention_output_bias=has_bias,
            mlp_bias=model_type == "llama" and bool(fields.get("mlp_bias")),
            qk_norm=model_type == "qwen3",
            sliding_window=_sliding_window(fields, model_type, numbers["num_hidden_layers"], source),
        )
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(source) else f"{source}: {message}") from None


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Content of a `config.json` that transformers 4 and 5 read as the same architecture: RoPE is in it twice, as
    `rope_theta` and `rope_scaling` for the former, as `rope_parameters` for the latter.

    Raises:
        UserError: no architecture of transformers has this set of features.
    """
    model_type = _model_type(config)
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.rope_type}
    for name in _ROPE_KEYS[rope["rope_type"]]:
        if getattr(scaling, name) is not None:
            rope[name] = getattr(scaling, name)
    described: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in _SIZES},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.attention_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dict(rope),
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if model_type in ("llama", "qwen3"):
        described["attention_bias"] = config.attention_bias
    if model_type == "llama":
        described["mlp_bias"] = config.mlp_bias
    if model_type == "mistral":
        described["sliding_window"] = config.sliding_window
    if model_type in ("qwen2", "qwen3"):
        has_window = config.sliding_window is not None
        described |= {
            "use_sliding_window": has_window,
            "sliding_window": config.sliding_window,
            "max_window_layers": 0 if has_window else config.num_hidden_layers,
            "layer_types": ["sliding_attention" if has_window else "full_attention"] * config.num_hidden_layers,
        }
    return described


def _model_type(config: LlamaConfig) -> str:
    """The architecture that has the features of `config`: llama where it can be."""
    biases = (config.attention_bias, config.attention_output_bias)
    has_window = config.sliding_window is not None
    # transformers' Llama refuses a width that is no multiple of the heads, even where head_dim is given.
    is_odd = config.hidden_size % config.num_attention_heads != 0
    if config.qk_norm:
        if biases[0] == biases[1] and not config.mlp_bias:
            return "qwen3"
    elif biases[0] == biases[1] and not has_window and not is_odd:
        return "llama"
    elif biases == (False, False) and not config.mlp_bias:
        return "mistral"
    elif biases == (True, False) and not config.mlp_bias:
        return "qwen2"
    names = ("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm", "sliding_window")
    found = ", ".join(f"{name} {getattr(config, name)}" for name in names)
    raise UserError(
        f"no Hugging Face architecture has these features together: {found}; docs/pretrained.md has a table"
    )


def _check_features(fields: Mapping[str, Any], model_type: str, source: str) -> None:
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields[name] is not None and fields[name] != neutral:
            raise UserError(f"{source}: {name} is {_shown(fields[name])}; accepted: {neutral!r}")
    if isinstance(fields.get("auto_map"), Mapping) and "AutoModelForCausalLM" in fields["auto_map"]:
        raise UserError(
            f"{source}: auto_map names code of its own, {_shown(fields['auto_map']['AutoModelForCausalLM'])}; "
            "none is run"
        )
    named = fields.get("architectures")
    if named and named != [ARCHITECTURES[model_type]]:
        raise UserError(f"{source}: architectures is {_shown(named)}; accepted: ['{ARCHITECTURES[model_type]}']")


def _rope(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Everything said of RoPE: transformers 5 keeps it in one dictionary, transformers 4 spread it over two keys."""
    found = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise UserError(f"{source}: rope_parameters differ by layer; accepted: one RoPE for all layers")
    rope = dict(found)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UserError(f"{source}: partial_rotary_factor is {_shown(found['partial_rotary_factor'])}; accepted: 1.0")
    if rope["rope_type"] not in tuple(_ROPE_KEYS):  # compared, not hashed: it may be a list
        raise UserError(
            f"{source}: rope_type is {_shown(rope['rope_type'])}; accepted: {', '.join(('default', *ROPE_TYPES))}"
        )
    return rope


def _rope_theta(fields: Mapping[str, Any], source: str) -> float:
    rope = _rope(fields, source)
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    return _number({"rope_theta": 10_000.0 if theta is None else theta}, "rope_theta", source, float)


def _rope_scaling(fields: Mapping[str, Any], source: str) -> RopeScaling | None:
    rope = _rope(fields, source)
    rope_type = rope.pop("rope_type")
    rope.pop("rope_theta", None)
    if rope_type == "default":
        return None
    mscales = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if all(mscales) and rope.get("attention_factor") is None:
        raise UserError(f"{source}: mscale and mscale_all_dim are given; accepted: attention_factor")
    unknown = sorted(set(rope) - set(_ROPE_KEYS[rope_type]) - {"original_max_position_embeddings", "finetuned"})
    if unknown:
        raise UserError(
            f"{source}: rope_parameters has {unknown[0]}, which RoPE of type {rope_type} is not known to take"
        )
    values = {name: rope[name] for name in _ROPE_KEYS[rope_type] if rope.get(name) is not None}
    original = "original_max_position_embeddings"
    if original in _ROPE_KEYS[rope_type]:
        # Beside the dictionary, it wins in transformers too.
        values[original] = fields.get(original) or values.get(original) or fields["max_position_embeddings"]
    for name in values:
        if name != "truncate":
            values[name] = _number(values, name, source, int if name == original else float)
    if "factor" not in values:
        raise UserError(f"{source}: rope_parameters has no factor, which RoPE of type {rope_type} needs")
    return RopeScaling(rope_type=rope_type, **values)


def _sliding_window(fields: Mapping[str, Any], model_type: str, num_layers: int, source: str) -> int | None:
    """Tokens in sight, of all layers alike."""
    if model_type == "llama":
        return None
    window = None if fields.get("sliding_window") is None else _number(fields, "sliding_window", source)
    if window is None or (model_type != "mistral" and not fields.get("use_sliding_window", False)):
        return None
    layers = fields.get("layer_types")
    if layers is None:
        windowed = {"max_window_layers": 28} | dict(fields)
        first = 0 if model_type == "mistral" else _number(windowed, "max_window_layers", source)
        layers = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if not isinstance(layers, Sequence) or not layers or any(kind != layers[0] for kind in layers):
        raise UserError(f"{source}: layer_types are not all alike; accepted: one kind of attention in all layers")
    # transformers' Mistral has its window in every layer, whatever layer_types says.
    return window if layers[0] == "sliding_attention" or model_type == "mistral" else None


def _number(fields: Mapping[str, Any], name: str, source: str, kind: type = int) -> Any:
    """A field that must be there and be a number, whole where `kind` is int."""
    if name not in fields:
        raise UserError(f"{source} has no {name}")
    value = fields[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST[kind]
    if not is_number or (kind is int and value != int(value)):
        what = f"whole number below {_LARGEST[int]:,}" if kind is int else "number"
        raise UserError(f"{source}: {name} is {_shown(value)}; expected a {what}")
    return kind(value)


def _shown(value: Any) -> str:
    """A value in one line of bounded length."""
    return " ".join(repr(value).split())[:80]
