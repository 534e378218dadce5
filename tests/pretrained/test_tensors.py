"""Tensors on disk: each form gives the same tensors, one at a time, and every damage one line."""

import json
import re
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import save_file

from muse_lightning.errors import UserError
from muse_lightning.pretrained.tensors import check_shapes, open_folder, open_pickle, open_safetensors
from tests.pretrained.checkpoints import stored_state, tiny_llama, write_hf

FORMS = ["single", "shards", "pickle", "pickle-shards"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_each_tensor(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    llama = tiny_llama(dtype, tie_word_embeddings=False)
    store = open_folder(write_hf(tmp_path / "model", llama, form=form))
    state = stored_state(llama)
    assert set(store) == set(state)
    assert len(store) == len(state)
    for name, tensor in state.items():
        assert store.shape(name) == tensor.shape
        assert store.dtype(name) == tensor.dtype == dtype
        assert torch.equal(store[name], tensor)
    with pytest.raises(KeyError):
        store["other"]


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", tiny_llama(), form="shards")
    store = open_folder(folder)
    name = next(iter(store))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert store.shape(name)
    with pytest.raises(UserError, match=rf"safetensors: {name} cannot be read any more: "):
        store[name]


def test_safetensors_come_first(tmp_path: Path) -> None:
    write_hf(tmp_path / "model", tiny_llama(seed=1), form="pickle")
    save_file({"a": torch.ones(2)}, tmp_path / "model" / "model.safetensors")
    assert list(open_folder(tmp_path / "model")) == ["a"]


@pytest.mark.parametrize("form", ["single", "pickle"])
def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path, form: str) -> None:
    state = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(2), "a": torch.ones(2)}
    file = tmp_path / ("model.safetensors" if form == "single" else "pytorch_model.bin")
    (save_file if form == "single" else torch.save)(state, file)
    assert list(open_folder(tmp_path)) == ["a"]


def one_line(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        open_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", ["shards", "pickle-shards"])
def test_a_missing_shard(tmp_path: Path, form: str) -> None:
    folder = write_hf(tmp_path / "model", tiny_llama(), form=form)
    (lost,) = folder.glob("*-00002-of-*")
    lost.unlink()
    assert one_line(folder).startswith(f"{lost} is missing; ")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_cut_short(tmp_path: Path, form: str, share: float) -> None:
    folder = write_hf(tmp_path / "model", tiny_llama(), form=form)
    file = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))[0]
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    message = one_line(folder)
    assert str(file) in message
    assert ("not a whole file" if "pickle" in form else "is not readable as safetensors") in message


def test_a_shard_without_what_the_index_says(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", tiny_llama(), form="shards")
    file = folder / "model-00002-of-00003.safetensors"
    save_file({"a": torch.ones(2)}, file)
    assert f"{file} has no tensor model." in one_line(folder)


def test_nothing_there(tmp_path: Path) -> None:
    assert one_line(tmp_path).startswith(f"no weights at {tmp_path}; accepted: a folder with model.safetensors or")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_dtype_of_quantised_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.ones(2).to(dtype)}, tmp_path / "model.safetensors")
    assert "w is of type" in one_line(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2).to(dtype)}, tmp_path / "pytorch_model.bin")
    assert f"w is of type {dtype}; accepted: float64, float32, float16, bfloat16" in one_line(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": []}}', b"\xff"],
)
def test_a_broken_index(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{path} is not an index of weights: " in one_line(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/secret.safetensors", "{root}/secret.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"a": torch.ones(2)}, place / "secret.safetensors")
    name = name.format(root=tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"names the file {name!r}; accepted: names of files in its own folder" in one_line(folder)


class Hostile:
    """Unpickled without care, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": Hostile(tmp_path / "ran")}, file)
    what = rf"{re.escape(str(file))} is not a file of torch\.save with tensors alone: it needs"
    assert re.fullmatch(what + r" \w+\.open, which is not run; accepted: safetensors", one_line(tmp_path))
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)  # the file does what it is feared for
    assert (tmp_path / "ran").exists()


def test_a_damaged_pickle(tmp_path: Path) -> None:
    """An archive whose pickle is none."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, file)
    with ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"\x80\x02\x93." if name.endswith("data.pkl") else content)
    message = one_line(tmp_path)
    assert message.startswith(f"{file} is not a file of torch.save with tensors alone: ")
    assert "weights_only" not in message


def test_the_format_before_torch_1_6(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert one_line(tmp_path).endswith(
        ": it has the format of torch before 1.6; accepted: safetensors, or saved by a newer"
    )


@pytest.mark.parametrize(
    ("tensor", "kind"), [(torch.ones(2).to_sparse(), "sparse_coo"), (torch.ones(2, device="meta"), "without values")]
)
def test_tensors_that_are_not_dense(tmp_path: Path, tensor: torch.Tensor, kind: str) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": tensor}, file)
    assert one_line(tmp_path) == f"{file}: w is a tensor {kind}; accepted: strided ones with values"


def test_parameters_are_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "pytorch_model.bin")
    found = open_folder(tmp_path)["w"]
    assert not found.requires_grad
    assert torch.equal(found, torch.ones(2))


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.bin")
    with pytest.raises(UserError, match=r"list.bin is not .*: it has no state dict"):
        open_pickle(tmp_path / "list.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"broken\.safetensors is not readable as safetensors"):
        open_safetensors(tmp_path / "broken.safetensors")


def test_tied(tmp_path: Path) -> None:
    store = open_folder(write_hf(tmp_path / "tied", tiny_llama()))
    assert "lm_head.weight" not in store
    assert torch.equal(store.tied("x")["lm_head.weight"], store["model.embed_tokens.weight"])
    own = open_folder(write_hf(tmp_path / "own", tiny_llama(tie_word_embeddings=False)))
    with pytest.raises(UserError, match=r"x has a head of its own: config.tie_word_embeddings is true"):
        own.tied("x")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": (2, 3)}, "x has no tensor b; the model of y needs it, 4"),
        ({"a": (3, 2), "b": (4,)}, "x is of another shape: a is 3x2 there, 2x3 in y"),
        ({"a": (2, 3), "b": (4,), "c": (5, 6)}, "x has a tensor c, 5x6, which the model of y lacks"),
        ({"a": (2, 3), "b": (4,)}, None),
    ],
    ids=["missing", "shape", "more", "equal"],
)
def test_check_shapes(found: dict[str, tuple[int, ...]], message: str | None) -> None:
    model = {"a": (2, 3), "b": (4,)}
    if message is None:
        check_shapes(model, found, "x", "y")
        return
    with pytest.raises(UserError) as error:
        check_shapes(model, found, "x", "y")
    assert str(error.value) == message
