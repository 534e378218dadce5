"""Every packaged preset, and that the two named after published models have their parameter counts."""

import pytest
import torch

from muse_lightning.attention import Dense
from muse_lightning.errors import UserError
from muse_lightning.model import Llama, load_preset, preset_path
from muse_lightning.model.presets import preset_names

# 1b, 8b: the element counts of the published safetensors of meta-llama/Llama-3.2-1B and meta-llama/Llama-3.1-8B.
PARAMETERS = {
    "demo": 1_930_944,
    "30m": 29_794_176,
    "75m": 75_510_528,
    "150m": 150_230_016,
    "400m": 402_697_728,
    "1b": 1_235_814_400,
    "8b": 8_030_261_248,
}


def test_all_presets_are_counted_here():
    assert set(preset_names()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        llama = Llama(load_preset(name), Dense)
    assert sum(parameter.numel() for parameter in llama.parameters()) == PARAMETERS[name]
    assert all(parameter.is_meta for parameter in llama.parameters())


def test_overrides():
    config = load_preset("1b", num_hidden_layers=2, rope_scaling=None)
    assert (config.num_hidden_layers, config.rope_scaling, config.hidden_size) == (2, None, 2048)


def test_unknown_name():
    with pytest.raises(UserError, match=r"preset '75' does not exist; nearest: 75m"):
        preset_path("75")
