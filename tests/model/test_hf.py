"""Against transformers: the same weights give the same logits under the same names; configurations go both ways."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from muse_lightning.attention import exact_attention
from muse_lightning.errors import UserError
from muse_lightning.model import Llama, LlamaConfig, RopeScaling, load_preset
from muse_lightning.model.hf import _NEUTRAL, config_from_hf, config_to_hf
from muse_lightning.model.presets import preset_names

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from 0, so that every term of the network shows in the logits
}
LLAMA3 = RopeScaling(factor=8.0, original_max_position_embeddings=32)
LINEAR = RopeScaling(factor=3.0, rope_type="linear")
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=64, rope_type="yarn")
QWEN2 = {"attention_bias": True}
FULL_BIAS = {"attention_bias": True, "attention_output_bias": True}

FEATURES = {
    "mha": {"num_key_value_heads": 6},
    "gqa3-untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "mqa": {"num_key_value_heads": 1},
    "llama3-rope": {"rope_scaling": LLAMA3},
    "head_dim16-untied-llama3-rope": {"head_dim": 16, "tie_word_embeddings": False, "rope_scaling": LLAMA3},
    "mistral-odd-width": {"hidden_size": 50, "head_dim": 8},
    "eps-theta": {"rms_norm_eps": 0.1, "rope_theta": 100.0},
    "linear-rope": {"rope_scaling": LINEAR},
    "yarn": {"rope_scaling": YARN},
    "biases": FULL_BIAS | {"mlp_bias": True},
    "mistral": {"sliding_window": 40},
    "qwen2": QWEN2,
    "qwen2-window": QWEN2 | {"sliding_window": 40, "head_dim": 10},
    "qwen3": {"qk_norm": True, "head_dim": 12},
    "qwen3-biases-window": {"qk_norm": True, "sliding_window": 7, **FULL_BIAS},
}
MODEL_TYPES = {"mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}


def random_features(seed: int) -> dict[str, Any]:
    """Fields of a small architecture, each drawn by itself; of biases and QK-norm those sets that transformers has."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 4, 6])
    head_dim = draw.choice([4, 8, 10, 16])
    kinds = [{}, FULL_BIAS, FULL_BIAS | {"mlp_bias": True}, {"mlp_bias": True}]
    windowed = [{}, QWEN2, {"qk_norm": True}, FULL_BIAS | {"qk_norm": True}]
    has_window = draw.random() < 0.5
    return {
        "vocab_size": draw.randrange(50, 120),
        "hidden_size": draw.choice([heads * head_dim, 24, 48]),
        "intermediate_size": draw.choice([32, 80]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 3, 6) if heads % n == 0]),
        "head_dim": head_dim,
        "rope_theta": draw.choice([100.0, 10_000.0, 1e6]),
        "rms_norm_eps": draw.choice([1e-6, 1e-2]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_scaling": draw.choice(
            [
                None,
                RopeScaling(draw.choice([2.0, 5.5]), 32, draw.choice([0.5, 1.0]), draw.choice([2.0, 4.0])),
                RopeScaling(draw.choice([2.0, 5.5]), rope_type="linear"),
                RopeScaling(
                    draw.choice([2.0, 4.0]),
                    original_max_position_embeddings=64,
                    rope_type="yarn",
                    beta_fast=draw.choice([8.0, 32.0]),
                    attention_factor=draw.choice([None, 1.3]),
                    truncate=draw.random() < 0.5,
                ),
            ]
        ),
        "sliding_window": draw.choice([1, 5, 33]) if has_window else None,
        **draw.choice(windowed if has_window else kinds + windowed),
    }


def hugging_face_model(config: LlamaConfig) -> torch.nn.Module:
    """transformers' model of the architecture, from the `config.json` that we write."""
    fields = config_to_hf(config)
    described = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(described, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # ones would hide a norm that is not applied
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def assert_same_logits(config: LlamaConfig) -> None:
    theirs = hugging_face_model(config)
    ours = Llama(config, exact_attention(config.sliding_window))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    input_ids = torch.randint(config.vocab_size, (2, 130))
    with torch.no_grad():
        difference = ours(input_ids) - theirs(input_ids).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("name", FEATURES)
def test_logits_equal_transformers(name: str) -> None:
    config = LlamaConfig(**(SMALL | FEATURES[name]))
    assert_same_logits(config)
    assert config_to_hf(config)["model_type"] == MODEL_TYPES.get(name.split("-")[0], "llama")


@pytest.mark.parametrize("seed", range(24))
def test_logits_of_a_random_architecture(seed: int) -> None:
    assert_same_logits(LlamaConfig(**(SMALL | random_features(seed))))


@pytest.mark.parametrize("config", [load_preset(name) for name in preset_names()], ids=preset_names())
def test_a_preset_goes_to_hugging_face_and_back(config: LlamaConfig) -> None:
    assert_there_and_back(config)


@pytest.mark.parametrize("name", FEATURES)
def test_an_architecture_goes_to_hugging_face_and_back(name: str) -> None:
    assert_there_and_back(LlamaConfig(**(SMALL | {"head_dim": 8} | FEATURES[name])))


def assert_there_and_back(config: LlamaConfig) -> None:
    fields = config_to_hf(config)
    assert config_from_hf(fields) == config
    # As transformers 5 writes it, and as transformers 4 did, without rope_parameters.
    assert config_from_hf(AutoConfig.for_model(**fields).to_dict()) == config
    assert config_from_hf({name: value for name, value in fields.items() if name != "rope_parameters"}) == config


def test_rope_is_there_for_transformers_4_and_5() -> None:
    fields = config_to_hf(LlamaConfig(**SMALL, rope_theta=7e5, rope_scaling=YARN))
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
    assert (fields["rope_theta"], fields["rope_scaling"]) == (7e5, scaling)
    assert fields["rope_parameters"] == scaling | {"rope_theta": 7e5}


# As published: what matters of config.json of Mistral-7B-v0.1, Qwen2.5-Coder-7B and Qwen3-0.6B.
PUBLISHED = {
    "mistral": (
        {"model_type": "mistral", "hidden_size": 4096, "num_key_value_heads": 8, "sliding_window": 4096},
        {"sliding_window": 4096, "attention_bias": False, "rope_theta": 10_000.0},
    ),
    "qwen2.5": (
        {
            "model_type": "qwen2",
            "sliding_window": 131_072,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "rope_theta": 1_000_000.0,
            "num_key_value_heads": 4,
        },
        {"sliding_window": None, "attention_bias": True, "attention_output_bias": False, "rope_theta": 1e6},
    ),
    "qwen3": (
        {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "hidden_size": 1024, "rope_scaling": None},
        {"qk_norm": True, "head_dim": 128, "attention_bias": False},
    ),
    "qwen2-yarn": (
        {
            "model_type": "qwen2",
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        {"rope_scaling": YARN},
    ),
    "original-length-beside": (
        {
            "model_type": "llama",
            "original_max_position_embeddings": 64,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
        {"rope_scaling": YARN},
    ),
    "qwen2-all-windowed": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
        {"sliding_window": 512},
    ),
    "qwen2-none-windowed": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 32},
        {"sliding_window": None},
    ),
    "harmless-keys": (
        {"model_type": "llama", "pretraining_tp": 2, "_name_or_path": "x", "torch_dtype": "bfloat16", "auto_map": None},
        {"qk_norm": False},
    ),
}
BARE = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"} | {"num_attention_heads": 32}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    fields, expected = PUBLISHED[name]
    found = config_from_hf(BARE | {"hidden_size": 128} | fields)
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_not_said_is_as_in_transformers(model_type: str) -> None:
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {"model_type": model_type} | {name: (BARE | {"hidden_size": 4096})[name] for name in kept}
    found, theirs = config_from_hf(fields), config_from_hf(AutoConfig.for_model(**fields).to_dict())
    # Qwen2's configuration has no head_dim.
    assert replace(found, head_dim=found.attention_head_dim) == replace(theirs, head_dim=theirs.attention_head_dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; accepted: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None; accepted: llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: 'silu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'; accepted: default, llama3, linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; accepted"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters has no factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor is '2'; expected a number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5; it must be at"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "ntk": 1}}, "has ntk, which RoPE of type linear"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters differ by layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; accepted: 1.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; accepted: None"),
        ({"num_local_experts": 8}, "num_local_experts is 8; accepted: 0"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.My"}}, "auto_map names code of its own, 'modeling.My'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "accepted: ['LlamaForCausalLM']"),
        ({"hidden_size": "48"}, "hidden_size is '48'; expected a whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5; expected a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number"),
        ({"num_attention_heads": 7}, "config.num_key_value_heads is 2; it must divide config.num_attention_heads, 7"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
            | {"architectures": None},
            "layer_types are not all alike",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_we_lack_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_hf(config_to_hf(LlamaConfig(**SMALL)) | change, "models/x/config.json")
    assert str(error.value).startswith("models/x/config.json: ") or "has no" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


ODD = [None, True, -1, 0, 10**400, 1e308, float("inf"), float("nan"), "x", [], ["x"], [["x"]], {}, {"x": 1}, {"x": {}}]
RICH = {
    "llama": {"rope_scaling": LLAMA3},
    "mistral": {"rope_scaling": LINEAR, "sliding_window": 9, "num_key_value_heads": 2},
    "qwen2": {"rope_scaling": YARN, "sliding_window": 9, **QWEN2},
    "qwen3": {"qk_norm": True, "sliding_window": 9, "rope_scaling": YARN},
}


@pytest.mark.parametrize("model_type", RICH)
def test_whatever_stands_at_a_key_is_taken_or_refused_in_one_line(model_type: str) -> None:
    fields = config_to_hf(LlamaConfig(**(SMALL | RICH[model_type])))
    assert fields["model_type"] == model_type
    changed = [fields | {key: value} for key in (*fields, *_NEUTRAL, "auto_map", "max_window_layers") for value in ODD]
    for form in ("rope_scaling", "rope_parameters"):
        alone = {key: value for key, value in fields.items() if key not in ("rope_scaling", "rope_parameters")}
        rope = fields[form]
        changed += [alone | {form: rope | {key: value}} for key in (*rope, "type", "mscale") for value in ODD]
    without_layers = {key: value for key, value in fields.items() if key != "layer_types"}
    changed += [without_layers | {"max_window_layers": value} for value in ODD]
    messages = []
    for change in changed:
        try:
            config = config_from_hf(change)
        except UserError as error:
            messages.append(str(error))
        else:
            assert all(not isinstance(value, int) or value < 1 << 30 for value in vars(config).values())
    assert len(messages) > len(changed) / 3
    assert all("\n" not in message and len(message) < 300 for message in messages)


def test_a_size_that_is_not_there() -> None:
    fields = config_to_hf(LlamaConfig(**SMALL))
    del fields["hidden_size"]
    with pytest.raises(UserError, match=r"config\.json has no hidden_size"):
        config_from_hf(fields)


def test_features_that_no_architecture_has_together() -> None:
    config = LlamaConfig(**SMALL, sliding_window=8, mlp_bias=True)
    with pytest.raises(UserError, match=r"no Hugging Face architecture has .* mlp_bias True.* sliding_window 8"):
        config_to_hf(config)
