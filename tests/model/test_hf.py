"""Against transformers: the same weights give the same logits under the same names; formats go both ways."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import LlamaForCausalLM

from muse_lightning.attention import Dense
from muse_lightning.errors import UserError
from muse_lightning.model import Llama, LlamaConfig, RopeScaling, load_preset
from muse_lightning.model.hf import config_from_hf, config_to_hf, load_pretrained
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
SCALING = RopeScaling(factor=8.0, original_max_position_embeddings=32)


def hugging_face_model(config: LlamaConfig) -> LlamaForCausalLM:
    model = LlamaForCausalLM(HuggingFaceConfig(**config_to_hf(config))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # ones would hide a norm that is not applied
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 2, "tie_word_embeddings": False},
        {"num_key_value_heads": 1},
        {"rope_scaling": SCALING},
        {"head_dim": 16, "tie_word_embeddings": False, "rope_scaling": SCALING},
        {"rms_norm_eps": 0.1, "rope_theta": 100.0},
    ],
    ids=["mha", "gqa3-untied", "mqa", "llama3-rope", "head_dim16-untied-llama3-rope", "eps-theta"],
)
def test_logits_equal_transformers(change):
    config = LlamaConfig(**(SMALL | change))
    theirs = hugging_face_model(config)
    ours = Llama(config, Dense)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    input_ids = torch.randint(config.vocab_size, (2, 130))
    with torch.no_grad():
        difference = ours(input_ids) - theirs(input_ids).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("name", preset_names())
def test_config_goes_to_hugging_face_and_back(name):
    config = load_preset(name)
    assert config_from_hf(HuggingFaceConfig(**config_to_hf(config)).to_dict()) == config
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; accepted: 'llama'"),
        ({"attention_bias": True}, "attention_bias is True; accepted: False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'; accepted: default, llama3"),
    ],
    ids=["model_type", "bias", "activation", "rope"],
)
def test_what_we_lack_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(config_to_hf(LlamaConfig(**SMALL)) | change)


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["single", "sharded"])
def test_load_pretrained_folder(tmp_path, shard_size):
    theirs = hugging_face_model(LlamaConfig(**SMALL, tie_word_embeddings=False))
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    state = load_pretrained(tmp_path)
    assert set(state) == set(theirs.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in theirs.state_dict().items())
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text())).num_hidden_layers == 3


def test_load_pretrained_file_and_errors(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert torch.equal(load_pretrained(tmp_path / "x.safetensors")["a"], torch.ones(2))
    with pytest.raises(UserError, match=r"no weights at .*model\.safetensors; accepted"):
        load_pretrained(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"broken\.safetensors is not readable as safetensors"):
        load_pretrained(tmp_path / "broken.safetensors")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": []}}', b"\xff"],
)
def test_a_broken_index_is_one_line(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"index\.json is not an index of safetensors files: \w+: ") as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/secret.safetensors", "{root}/secret.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"a": torch.ones(2)}, place / "secret.safetensors")
    name = name.format(root=tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    assert f"names the file {name!r}; accepted: names of files in its own folder" in str(error.value)
