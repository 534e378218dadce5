"""`muse import`: every tensor as it was, a recipe overlay that trains, and one line for what cannot be imported."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from muse_lightning.cli import main
from muse_lightning.model import RopeScaling
from muse_lightning.model.hf import config_from_hf
from muse_lightning.pretrained import write_model
from muse_lightning.pretrained.reference import open_model
from tests.pretrained.checkpoints import bpe_tokenizer, stored_state, tiny_llama, write_hf
from tests.recipe import Muse

LLAMA3 = RopeScaling(factor=4.0, original_max_position_embeddings=16)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama3-untied": {"rope_scaling": LLAMA3, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 9, "tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 8},
}


@pytest.fixture
def muse(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Muse:
    monkeypatch.chdir(tmp_path)
    return Muse(tmp_path, capsys)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, read by the library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["shards", "pickle"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_bit_there_and_back(tmp_path: Path, name: str, form: str, dtype: torch.dtype) -> None:
    """Imported, and exported from there: the tensors of the source, in its dtype, and its architecture."""
    llama = tiny_llama(dtype, **ARCHITECTURES[name])
    with torch.no_grad():
        llama.model.norm.weight[:3] = torch.tensor([float("inf"), -0.0, torch.finfo(dtype).tiny / 4])
    source = write_hf(tmp_path / "source", llama, form=form)
    assert main(["import", str(source), "--output", str(tmp_path / "imported")]) == 0
    assert main(["export", str(tmp_path / "imported"), "--output", str(tmp_path / "exported")]) == 0
    for folder in (tmp_path / "imported", tmp_path / "exported"):
        assert_equal(tensors_of(folder), stored_state(llama))
        described = json.loads((folder / "config.json").read_text())
        assert config_from_hf(described) == config_from_hf(json.loads((source / "config.json").read_text()))
        assert described["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_tensors_keep_their_own_dtype_and_another_is_made_on_request(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source", tiny_llama(torch.bfloat16))
    state = stored_state(tiny_llama(torch.bfloat16)) | {"model.norm.weight": torch.rand(16)}
    save_file(state, source / "model.safetensors")
    assert main(["import", str(source), "--output", str(tmp_path / "kept")]) == 0
    assert_equal(tensors_of(tmp_path / "kept"), state)
    assert main(["import", str(source), "--output", str(tmp_path / "half"), "--dtype=float16"]) == 0
    assert_equal(tensors_of(tmp_path / "half"), {name: tensor.half() for name, tensor in state.items()})
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("cast_bytes", [100, 1 << 24])
@pytest.mark.parametrize("form", ["single", "pickle"])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")])
def test_a_cast_in_parts(
    tmp_path: Path, form: str, dtypes: tuple[str, str], cast_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite values and NaN stay what they are; so does a tensor that is stored by columns."""
    monkeypatch.setattr(write_model, "CAST_BYTES", cast_bytes)
    before, after = (getattr(torch, dtype) for dtype in dtypes)
    state = stored_state(tiny_llama(before))
    state["model.norm.weight"][:4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 60_000.0])
    source = write_hf(tmp_path / "source", tiny_llama(before), form=form)
    if form == "single":
        save_file(state, source / "model.safetensors")
    else:
        name = "model.layers.0.mlp.up_proj.weight"
        torch.save(state | {name: state[name].T.contiguous().T}, source / "pytorch_model.bin")
    assert main(["import", str(source), "--output", str(tmp_path / "out"), f"--dtype={dtypes[1]}"]) == 0
    assert_equal(tensors_of(tmp_path / "out"), {name: tensor.to(after) for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("stored", "value", "dtype", "message"),
    [
        ("bfloat16", -1e6, "float16", "a value of 9.994e+05, which is infinite in float16 (up to 6.55e+04)"),
        ("float32", 3.4028e38, "bfloat16", "a value of 3.403e+38, which is infinite in bfloat16 (up to 3.39e+38)"),
        ("float64", 1e300, "float32", "a value of 1e+300, which is infinite in float32 (up to 3.403e+38)"),
    ],
)
def test_a_value_that_a_dtype_cannot_hold(muse: Muse, stored: str, value: float, dtype: str, message: str) -> None:
    llama = tiny_llama(getattr(torch, stored))
    with torch.no_grad():
        llama.model.norm.weight[3:5] = torch.tensor([float("nan"), value], dtype=torch.float64)
    write_hf(muse.folder / "large", llama)
    for verb in ("import", "export"):
        assert muse.error(verb, "large", "--output", "out", f"--dtype={dtype}") == (
            f"dtype: model.norm.weight has {message}; without dtype it stays {stored}"
        )


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_model, "SHARD_BYTES", 6000)
    llama = tiny_llama()
    source = write_hf(tmp_path / "source", llama)
    assert main(["import", str(source), "--output", str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))
    ]
    assert len(files) > 3
    # A tensor larger than a shard has one of its own.
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 6000 or len(load_file(file)) == 1 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored_state(llama).values())
    assert_equal(tensors_of(tmp_path / "out"), stored_state(llama))
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_tokenizer_files_and_token_ids_are_copied(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source", tiny_llama())
    bpe_tokenizer("<bos>", "<eos>", bos="<bos>").save(str(source / "tokenizer.json"))
    texts = {
        "tokenizer_config.json": '{"eos_token": {"content": "<eos>"}, "bos_token": "<bos>"}',
        "generation_config.json": '{"temperature": 0.6}',
        "merges.txt": "a b",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    (source / "modeling_evil.py").write_text("raise SystemExit")
    described = json.loads((source / "config.json").read_text()) | {"bos_token_id": 7, "eos_token_id": [8, 9]}
    (source / "config.json").write_text(json.dumps(described))
    assert main(["import", str(source), "--output", str(tmp_path / "out")]) == 0
    for name in (*texts, "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (7, [8, 9], None)
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_overlay_trains(muse: Muse, name: str) -> None:
    """Over a recipe of another architecture: what was imported is what training begins from."""
    llama = tiny_llama(**ARCHITECTURES[name])
    source = write_hf(muse.folder / "models" / "original", llama)
    bpe_tokenizer("<|repo_name|>", "<|file_sep|>", "<|endoftext|>").save(str(source / "tokenizer.json"))
    assert muse("import", "models/original", "--output", "imported")[0] == 0
    recipe = yaml.safe_load((muse.folder / "recipe.yaml").read_text())
    if llama.config.sliding_window is not None:
        # Over the arguments of Muse attention it would be refused: none is dropped silently.
        del recipe["model"]["attention"]
        (muse.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = muse("fit", "-c", "recipe.yaml", "-c", "imported/recipe.yaml")
    assert code == 0, err
    run = muse.folder / "runs" / "tiny" / "version_0"
    stored, overlay = (yaml.safe_load(path.read_text()) for path in (run / "config.yaml", Path("imported/recipe.yaml")))
    assert stored["model"]["config"] == overlay["model"]["config"]
    attention = stored["model"]["attention"]["class_path"].rpartition(".")[2]
    assert attention == ("Muse" if llama.config.sliding_window is None else "SlidingWindow")
    # After two steps of learning rate 3e-4 weights are near those that were imported.
    trained = open_model(run)
    for key, tensor in llama.state_dict().items():
        assert (trained.tensors[key] - tensor).abs().max() < 1e-3


@pytest.mark.parametrize(("num_layers", "heads"), [(2, 0), (3, 2)])
def test_the_overlay_has_the_first_layer_exact_and_as_many_heads(tmp_path: Path, num_layers: int, heads: int) -> None:
    source = write_hf(tmp_path / "original", tiny_llama(num_hidden_layers=num_layers, num_key_value_heads=2))
    assert main(["import", str(source), f"--output={tmp_path / 'out'}"]) == 0
    model = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["model"]
    assert (model["exact_layers"], model["exact_heads"]) == ([0], heads)


@pytest.mark.parametrize(
    ("own", "vocab_size", "settings", "expected"),
    [
        (["<reserved_0>", "<reserved_1>"], 320, {}, ["<|repo_name|>", "<|file_sep|>", "<|endoftext|>"]),
        (
            ["<|file_sep|>", "<|repo_name|>", "<|endoftext|>", "<eos>"],
            320,
            {"eos_token": "<eos>"},
            ["<|repo_name|>", "<|file_sep|>", "<eos>"],
        ),
        (
            ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"],
            None,
            {"eos_token": {"content": "<|end_of_text|>"}, "bos_token": "<|begin_of_text|>"},
            ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|end_of_text|>"],
        ),
        (
            ["<unk>", "<s>", "</s>"],
            None,
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
            ["<s>", "<unk>", "</s>"],
        ),
        (
            ["<e>", "<r>", "<f>", "<|endoftext|>"],
            320,
            {"eos_token": "x", "document_special_tokens": {"repo_name": "<r>", "file_sep": "<f>", "end": "<e>"}},
            ["<r>", "<f>", "<e>"],
        ),
        (["<|im_start|>"], 320, {"eos_token": "<|im_start|>"}, ["<|repo_name|>", "<|file_sep|>", "<|im_start|>"]),
    ],
    ids=["none-but-room", "qwen", "llama3", "mistral", "own-export", "chat"],
)
def test_special_tokens_of_documents(
    tmp_path: Path, own: list[str], vocab_size: int | None, settings: dict[str, Any], expected: list[str]
) -> None:
    tokenizer = bpe_tokenizer(*own)
    size = vocab_size or tokenizer.get_vocab_size()
    source = write_hf(tmp_path / "source", tiny_llama(vocab_size=size))
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["import", str(source), "--output", str(tmp_path / "out")]) == 0
    special = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["data"]["special_tokens"]
    assert [special[field] for field in ("repo_name", "file_sep", "end")] == expected
    loaded = open_model(tmp_path / "out").load_tokenizer()
    assert loaded is not None
    assert loaded.vocab_size <= size


def test_no_room_for_special_tokens_is_said(muse: Muse) -> None:
    tokenizer = bpe_tokenizer("<eos>")
    source = write_hf(muse.folder / "source_model", tiny_llama(vocab_size=tokenizer.get_vocab_size()))
    tokenizer.save(str(source / "tokenizer.json"))
    code, _, err = muse("import", "source_model", "--output", "out")
    assert code == 0
    assert "set data.special_tokens to three of its tokens" in err
    (source / "tokenizer.json").unlink()
    code, _, err = muse("import", "source_model", "--output", "out2")
    assert code == 0
    assert "source_model has no tokenizer.json: give data.tokenizer in the recipe" in err


def break_shard(folder: Path) -> None:
    next(folder.glob("*-00003-of-*")).unlink()


def truncate(folder: Path) -> None:
    file = next(folder.glob("*-00001-of-*"))
    file.write_bytes(file.read_bytes()[:-10])


def large_tokenizer(folder: Path) -> None:
    bpe_tokenizer(*(f"<{number}>" for number in range(64)), size=384).save(str(folder / "tokenizer.json"))


def change(**fields: Any) -> Any:
    def rewrite(folder: Path) -> None:
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | fields))

    return rewrite


def pickled_object(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"w": Path("x")}, folder / "pytorch_model.bin")


def broken_settings(folder: Path) -> None:
    bpe_tokenizer("<e>").save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("[]")


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_shard, "model-00003-of-00003.safetensors is missing; model.safetensors.index.json names it"),
        (truncate, "model-00001-of-00003.safetensors is not readable as safetensors"),
        (change(model_type="gpt2"), "model_type is 'gpt2'; accepted: llama, mistral, qwen2, qwen3"),
        (change(rope_parameters={"rope_type": "longrope"}), "rope_type is 'longrope'; accepted: default, llama3"),
        (change(vocab_size=300), "is of another shape: model.embed_tokens.weight is 320x16 there, 300x16 in its"),
        (large_tokenizer, "tokenizer.json has ids up to"),
        (broken_tokenizer, "tokenizer.json is not a tokenizer.json"),
        (pickled_object, "pytorch_model.bin is not a file of torch.save with tensors alone: "),
    ],
    ids=["missing-shard", "truncated", "architecture", "rope", "shape", "vocabulary", "tokenizer", "pickle"],
)
def test_what_cannot_be_imported_nor_exported(muse: Muse, damage: Any, message: str) -> None:
    source = write_hf(muse.folder / "bad", tiny_llama(), form="shards")
    damage(source)
    for verb in ("import", "export"):
        assert message in muse.error(verb, "bad", "--output", "out/of/reach")


def test_damaged_settings_of_a_tokenizer(muse: Muse) -> None:
    broken_settings(write_hf(muse.folder / "bad", tiny_llama()))
    assert "tokenizer_config.json holds no settings; expected keys" in muse.error("import", "bad", "--output", "out")


def test_where_it_may_go_and_where_from(muse: Muse) -> None:
    write_hf(muse.folder / "good", tiny_llama())
    assert "output: source exists already; give a new folder" in muse.error("import", "good", "--output", "source")
    assert "recipe.yaml exists already" in muse.error("import", "good", "--output", "recipe.yaml")
    assert "cannot write in recipe.yaml: " in muse.error("import", "good", "--output", "recipe.yaml/x")
    assert "source: ./none does not exist; expected a folder, or the name" in muse.error(
        "import", "./none", "--output", "x"
    )
    assert "revision: main found, but good is a folder" in muse.error(
        "import", "good", "--output", "x", "--revision", "main"
    )
    assert "required, but not given: output" in muse.error("import", "good")
    assert "dtype" in muse.error("import", "good", "--output", "x", "--dtype=int8")


def test_a_disk_without_room(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(muse.folder / "good", tiny_llama())
    usage = write_model.shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(write_model.shutil, "disk_usage", lambda path: usage)
    assert "0.0 GB are free; give a folder with room" in muse.error("import", "good", "--output", "x")
    monkeypatch.undo()
    monkeypatch.chdir(muse.folder)

    for error in (OSError(28, "No space left on device"), SafetensorError("No space left on device")):
        monkeypatch.setattr(write_model, "save_file", Mock(side_effect=error))
        assert ": No space left on device" in muse.error("import", "good", "--output", "x")
