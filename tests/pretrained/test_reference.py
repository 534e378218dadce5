"""A model by reference: what each form gives, and what is said of those that give nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_lightning.attention import Dense, SlidingWindow
from muse_lightning.checkpoints.manifest import Manifest
from muse_lightning.errors import UserError
from muse_lightning.files import sha256_file
from muse_lightning.model import Llama, RopeScaling
from muse_lightning.pretrained.reference import ModelReference, open_model, open_weights
from tests.pretrained.checkpoints import bpe_tokenizer, tiny_llama, write_hf, write_run

YARN = RopeScaling(factor=2.0, original_max_position_embeddings=32, rope_type="yarn")


def same_weights(reference: ModelReference, llama: Llama) -> bool:
    state = llama.state_dict()
    return list(state) == sorted(reference.tensors, key=list(state).index) and all(
        torch.equal(tensor, reference.tensors[name]) for name, tensor in state.items()
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", ["hf", "run", "ckpt"])
def test_each_form(tmp_path: Path, form: str, tied: bool) -> None:
    fields: dict[str, Any] = {"tie_word_embeddings": tied, "qk_norm": True, "head_dim": 4, "rope_scaling": YARN}
    llama = tiny_llama(**fields)
    if form == "hf":
        path = write_hf(tmp_path / "hf", llama, form="shards")
    else:
        path = write_run(tmp_path / "run", llama)
        path = path if form == "run" else path / "checkpoints" / "step=2.ckpt"
    reference = open_model(str(path))
    assert reference.path == path
    assert reference.config == llama.config
    assert same_weights(reference, llama)
    loaded = reference.load()
    assert not loaded.training
    input_ids = torch.randint(320, (2, 40))
    assert torch.equal(loaded(input_ids), llama(input_ids))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    """By step, whichever was written last; of those with a manifest, if there are such, the newest that is whole."""
    run = tmp_path / "run"
    for step, seed in ((9, 1), (10, 2), (8, 3)):
        write_run(run, tiny_llama(seed=seed), step=step)
    assert same_weights(open_model(run), tiny_llama(seed=2))
    for step in (8, 9):
        path = run / "checkpoints" / f"step={step}.ckpt"
        Manifest(step, path.stat().st_size, sha256_file(path)).write(path)
    assert same_weights(open_model(run), tiny_llama(seed=1))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert same_weights(open_model(run), tiny_llama(seed=3))


@pytest.mark.parametrize(("stored", "asked"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_dtype(tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None) -> None:
    reference = open_model(write_hf(tmp_path / "hf", tiny_llama(stored)))
    loaded = reference.load(dtype=asked)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm_head.weight, reference.tensors["lm_head.weight"].bfloat16())


def test_attention_is_what_the_architecture_means_unless_another_is_given(tmp_path: Path) -> None:
    reference = open_model(write_hf(tmp_path / "hf", tiny_llama(sliding_window=7)))
    assert [(type(b.self_attn.attention), b.self_attn.attention.window) for b in reference.load().blocks] == [
        (SlidingWindow, 7)
    ] * 2
    assert [type(block.self_attn.attention) for block in reference.load(Dense).blocks] == [Dense] * 2
    whole = open_model(write_hf(tmp_path / "whole", tiny_llama()))
    assert [type(block.self_attn.attention) for block in whole.load().blocks] == [Dense] * 2


def test_loaded_weights_do_not_depend_on_their_file(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", tiny_llama())
    loaded = open_model(folder).load()
    before = [parameter.clone() for parameter in loaded.parameters()]
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-4096, os.SEEK_END)
        opened.write(b"\xff" * 4096)
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.parameters(), strict=True))


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_model(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_model(tmp_path: Path) -> None:
    accepted = "accepted: a Hugging Face folder, a run folder or a .ckpt of one"
    assert one_line(tmp_path / "none") == f"model: {tmp_path / 'none'} does not exist; {accepted}"
    assert one_line(tmp_path).endswith(f"has neither config.json nor config.yaml; {accepted}")
    (tmp_path / "x.bin").write_text("")
    assert one_line(tmp_path / "x.bin").endswith(f"is neither a folder nor a .ckpt; {accepted}")


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, tiny_llama()) / "checkpoints" / "step=2.ckpt"
    size = checkpoint.stat().st_size
    Manifest(2, size, sha256_file(checkpoint)).write(checkpoint)
    content = bytearray(checkpoint.read_bytes())
    content[size // 2] ^= 1
    checkpoint.write_bytes(content)
    for opened in (open_model, lambda path: open_weights(path, "model")):
        with pytest.raises(UserError, match="is damaged: its content has changed since it was saved"):
            opened(checkpoint)


def test_a_damaged_newest_checkpoint_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_run(tmp_path, tiny_llama()) / "checkpoints" / "step=2.ckpt"
    Manifest(2, whole.stat().st_size, sha256_file(whole)).write(whole)
    newest = whole.with_name("step=3.ckpt")
    newest.write_bytes(b"cut")
    Manifest(3, 4, "").write(newest)
    open_model(tmp_path)
    assert capsys.readouterr().err == f"checkpoint {newest} is not used: it has 3 bytes, its manifest says 4\n"


def test_a_folder_of_runs_names_the_newest(tmp_path: Path) -> None:
    for version in (0, 1):
        write_run(tmp_path / f"version_{version}", tiny_llama())
        os.utime(tmp_path / f"version_{version}" / "config.yaml", ns=(version, version))
    assert one_line(tmp_path).endswith(f"nearest: {tmp_path / 'version_1'}")


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama())
    (run / "checkpoints" / "step=2.ckpt").unlink()
    assert one_line(run).startswith(f"{run} is a run without a checkpoint: no file ")


def test_a_checkpoint_in_shards(tmp_path: Path) -> None:
    """Named, even where an older one is in a file: which of them is meant is not for us to say."""
    run = write_run(tmp_path / "run", tiny_llama())
    file, shards = (run / "checkpoints" / f"step={step}.ckpt" for step in (2, 4))
    shards.mkdir()
    (run / "checkpoints" / "step=6.ckpt").mkdir()  # no checkpoint
    assert open_model(run).load() is not None
    (shards / "meta.pt").touch()
    os.utime(file, ns=(1, 1))
    what = f"{shards} is a checkpoint in shards; accepted: "
    assert one_line(run) == f"{what}a checkpoint in one file, such as the older {file}"
    assert one_line(shards) == f"model: {what}one in a file, or a Hugging Face folder"
    with pytest.raises(UserError, match=r"model.weights: .* is a checkpoint in shards; accepted: one in a file"):
        open_weights(shards, "model.weights")
    assert open_model(file).load() is not None
    file.unlink()
    assert one_line(run) == f"{what}a checkpoint in one file"


def test_a_checkpoint_outside_its_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama())
    moved = (run / "checkpoints" / "step=2.ckpt").rename(tmp_path / "moved.ckpt")
    assert one_line(moved).startswith(
        f"{moved} lies in no run folder, so its architecture is not known: no config.yaml"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("data: {}", "is not the configuration of a run: it has no `model:`"),
        ("model: {}", "model.config is not an architecture"),
        ("model: {config: {vocab_size: 3}}", "model.config is not an architecture"),
        ("model: {config: {vocab_size: none}}", "model.config is not an architecture"),
    ],
)
def test_a_damaged_configuration_of_a_run(tmp_path: Path, text: str, message: str) -> None:
    run = write_run(tmp_path / "run", tiny_llama())
    (run / "config.yaml").write_text(text)
    found = one_line(run)
    assert found.startswith(str(run / "config.yaml"))
    assert message in found


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_damaged_configuration_of_hugging_face(tmp_path: Path, text: str) -> None:
    folder = write_hf(tmp_path / "hf", tiny_llama())
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert one_line(folder).startswith(str(folder / "config.json"))


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", tiny_llama())
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 3}))
    needed = "has no tensor model.layers.2.self_attn.q_proj.weight; the model of its configuration needs it"
    assert needed in one_line(folder)
    (folder / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": False}))
    assert "has no tensor lm_head.weight" in one_line(folder)


def test_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", tiny_llama())
    assert open_model(folder).load_tokenizer() is None
    bpe_tokenizer("<|endoftext|>").save(str(folder / "tokenizer.json"))
    tokenizer = open_model(folder).load_tokenizer()
    assert tokenizer is not None
    assert tokenizer.encode([b"def x"])[0].tolist() == bpe_tokenizer("<|endoftext|>").encode("def x").ids
    bpe_tokenizer(*(f"<{number}>" for number in range(64)), size=384).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer.json has ids up to \d+, the model's vocab_size is 320"):
        open_model(folder).load_tokenizer()


def test_the_tokenizer_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"repo_name": "<r>", "file_sep": "<f>", "end": "<e>"}
    data: dict[str, Any] = {"tokenizer": "bytes", "special_tokens": names}
    run = write_run(tmp_path / "run", tiny_llama(), data=data)
    tokenizer = open_model(run).load_tokenizer()
    assert tokenizer is not None
    assert tokenizer.decode([104, 105, 258]) == "hi<e>"

    (tmp_path / "tokens").mkdir()
    bpe_tokenizer("<r>", "<f>", "<e>").save("tokens/tokenizer.json")
    data |= {"tokenizer": "tokens", "dataset": "prepared"}
    write_run(run, tiny_llama(), data=data)
    from_recipe = open_model(run).load_tokenizer()
    (tmp_path / "tokens").rename(tmp_path / "prepared")  # the dataset has a copy
    from_dataset = open_model(run).load_tokenizer()
    assert from_recipe is not None
    assert from_dataset is not None
    assert from_recipe.sha256 == from_dataset.sha256
    assert from_recipe.vocab_size > 259
    (tmp_path / "prepared" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"config.yaml: data.tokenizer tokens is not on this machine"):
        open_model(run).load_tokenizer()


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama(vocab_size=258))
    with pytest.raises(UserError, match=r"run: the tokenizer has 259 ids, config.vocab_size is 258"):
        open_model(run).load_tokenizer()
