"""LlamaConfig refuses sizes that do not fit, by name."""

import pytest

from muse_lightning.errors import UserError
from muse_lightning.model import LlamaConfig, RopeScaling

FIELDS = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def test_head_dim_defaults_to_an_equal_share():
    assert LlamaConfig(**FIELDS).attention_head_dim == 8
    assert LlamaConfig(**FIELDS, head_dim=32).attention_head_dim == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "config.vocab_size is 0; it must be at least 1"),
        ({"num_hidden_layers": -1}, "config.num_hidden_layers is -1"),
        ({"rope_theta": 0.0}, "config.rope_theta is 0.0; it must be above 0"),
        ({"num_key_value_heads": 4}, "config.num_key_value_heads is 4; it must divide config.num_attention_heads, 6"),
        ({"hidden_size": 50}, "config.num_attention_heads is 6; it must divide config.hidden_size, 50"),
        ({"sliding_window": 0}, "config.sliding_window is 0; it must be at least 1, or null"),
        ({"head_dim": 7}, "config.head_dim is 7; it must be even"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_names_the_field(change, message):
    with pytest.raises(UserError) as error:
        LlamaConfig(**(FIELDS | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_type": "longrope"}, "rope_scaling.rope_type is 'longrope'; accepted: llama3, linear, yarn"),
        ({"original_max_position_embeddings": None}, "rope_scaling.original_max_position_embeddings is None"),
        ({"rope_type": "yarn", "beta_slow": 40.0}, "rope_scaling.beta_slow is 40.0; it must be above 0 and below"),
        ({"rope_type": "yarn", "attention_factor": 0.0}, "rope_scaling.attention_factor is 0.0; it must be above 0"),
        ({"factor": 0.5}, "rope_scaling.factor is 0.5; it must be at least 1"),
        ({"original_max_position_embeddings": 0}, "rope_scaling.original_max_position_embeddings is 0"),
        (
            {"low_freq_factor": 4.0},
            "rope_scaling.low_freq_factor is 4.0; it must be above 0 and below",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_rope_scaling_names_the_field(change, message):
    fields = {"factor": 8.0, "original_max_position_embeddings": 8192}
    with pytest.raises(UserError) as error:
        RopeScaling(**(fields | change))
    assert message in str(error.value)
