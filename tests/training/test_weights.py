"""Weights from a checkpoint, a file and a folder; and the one line that says why others do not fit."""

import pytest
import torch
from safetensors.torch import save_file

from muse_lightning.attention import Dense
from muse_lightning.errors import UserError
from muse_lightning.model import Llama, LlamaConfig
from muse_lightning.training.weights import check_checkpoint, load_weights, read_checkpoint
from tests.pretrained.checkpoints import write_hf, write_run
from tests.tiny import CONFIG


def llama(**changes):
    model = Llama(LlamaConfig(**(CONFIG | changes)), Dense)
    model.init_weights()
    return model


def save(state, path):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": {f"llama.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("x.ckpt", "x.ckpt"),
        ("x.safetensors", "x.safetensors"),
        ("folder/model.safetensors", "folder"),
        ("checkpoints/x.ckpt", ""),
    ],
    ids=["ckpt", "file", "folder", "run"],
)
def test_round_trip(tmp_path, written, read, tied):
    source, target = llama(tie_word_embeddings=tied), llama(tie_word_embeddings=tied)
    state = source.state_dict()
    if tied and not written.endswith(".ckpt"):
        del state["lm_head.weight"]  # as Hugging Face writes it
    (tmp_path / "config.yaml").write_text("model: {}")  # what tells a run folder
    save(state, tmp_path / written)
    load_weights(target, tmp_path / read)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert (target.lm_head.weight is target.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 32},
            "w.safetensors is of another shape: model.embed_tokens.weight is 32x32 there, 32x16 in this recipe",
        ),
        (
            {"num_key_value_heads": 4},
            "model.layers.0.self_attn.k_proj.weight is 16x16 there, 8x16 in this recipe",
        ),
        (
            {"num_hidden_layers": 1},
            "has no tensor model.layers.1.self_attn.q_proj.weight; the model of this",
        ),
        (
            {"num_hidden_layers": 3},
            "has a tensor model.layers.2.input_layernorm.weight, 16, which the model of this",
        ),
        ({"tie_word_embeddings": False}, "has a head of its own: config.tie_word_embeddings is true; accepted: false"),
    ],
    ids=["width", "kv-heads", "fewer-layers", "more-layers", "untied"],
)
def test_another_shape(tmp_path, changes, message):
    save(llama(**changes).state_dict(), tmp_path / "w.safetensors")
    target = llama()
    before = [parameter.clone() for parameter in target.parameters()]
    with pytest.raises(UserError) as error:
        load_weights(target, tmp_path / "w.safetensors")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))


class Hostile:
    """Unpickled without care, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_unreadable(tmp_path):
    with pytest.raises(UserError, match=r"model.weights: .*none.ckpt does not exist; accepted: a Hugging Face folder"):
        load_weights(llama(), tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    for name, reason in (("text", "not a whole file of torch.save"), ("other", "it has no state_dict")):
        path = tmp_path / f"{name}.ckpt"
        with pytest.raises(UserError, match=rf"{name}.ckpt is not a Lightning checkpoint of tensors: {reason}"):
            load_weights(llama(), path)
        with pytest.raises(UserError, match=rf"ckpt_path: .*{name}.ckpt is not a Lightning checkpoint of .*: {reason}"):
            read_checkpoint(path, "ckpt_path")


@pytest.mark.parametrize(
    "step", ["3", None, 2.5, -1, torch.zeros(9, 9)], ids=["text", "none", "half", "below", "tensor"]
)
def test_a_checkpoint_of_no_step(tmp_path, step):
    whole = {"state_dict": {}, "pytorch-lightning_version": "2", "optimizer_states": [], "lr_schedulers": []}
    path = tmp_path / "a.ckpt"
    torch.save({**whole, "global_step": 3}, path)
    check_checkpoint(str(path), for_training=True, max_steps=9)
    torch.save({**whole, "global_step": step}, path)
    with pytest.raises(UserError, match=r"ckpt_path: .*a.ckpt is of step .*, a number of at least 0 expected") as error:
        check_checkpoint(str(path), for_training=True, max_steps=9)
    assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"state_dict": Hostile(tmp_path / "ran")}, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match=r"hostile.ckpt is not a Lightning checkpoint of tensors"):
        load_weights(llama(), tmp_path / "hostile.ckpt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "hostile.ckpt", weights_only=False)  # the file does what it is feared for
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["hf", "run", "ckpt"])
def test_what_no_shape_shows_is_told(tmp_path, form):
    trained = llama(rope_theta=1e6, sliding_window=8)
    path = write_hf(tmp_path / "model", trained) if form == "hf" else write_run(tmp_path / "model", trained)
    path = path / "checkpoints" / "step=2.ckpt" if form == "ckpt" else path
    assert load_weights(llama(), path) == [
        f"model.config.rope_theta: 1000000.0 at {path}, 500000.0 in this recipe, which wins",
        f"model.config.sliding_window: 8 at {path}, None in this recipe, which wins",
    ]
    assert load_weights(llama(rope_theta=1e6, sliding_window=8), path) == []
