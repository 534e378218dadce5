"""`muse compare` from the command line to its files."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from muse_lightning.attention import SlidingWindow
from muse_lightning.cli import main
from muse_lightning.compare.blocks import read_blocks
from muse_lightning.compare.losses import losses
from muse_lightning.model import Llama
from muse_lightning.model.hf import config_to_hf
from tests.compare.conftest import CONFIG, SEQ_LEN, write_model
from tests.recipe import RECIPE

SIZES = ["chunk=16", "query_cluster=8", "key_cluster=4", "top_k=1", "candidates=2", "exact_below=16"]
OPTIONS = [f"--seq_len={SEQ_LEN}", "--blocks=2", "--device=cpu", *(f"--muse.{size}" for size in SIZES)]
GRID = ["--grid.chunk=[16]", "--grid.query_cluster=[8]", "--grid.key_cluster=[4]", "--grid.top_k=[1, 3, 24]"]


def test_a_sweep_from_model_to_recipe(
    folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", f"--model={folder}", f"--data={dataset}", *OPTIONS, "--sweep=true", *GRID]
    arguments += ["--exact_layers=[]"]
    assert main([*arguments, "--max_loss_increase=0.5", "--out=found"]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in Path("found").iterdir()} == {
        *("compare.json", "compare.md", "compare.png", "recommended.yaml")
    }
    content = json.loads(Path("found/compare.json").read_text())
    by_name = {each["name"]: each for each in content["settings"]}
    assert list(by_name)[:4] == ["Dense", "Muse", "SpatialBlocks", "SlidingWindow 16"]
    assert [each["attention"]["init_args"]["top_k"] for each in content["settings"][4:]] == [3, 24]
    assert by_name["Dense"]["loss_rise"] == 0
    assert len(by_name["Muse"]["relative_squared_error_by_layer_and_head"]) == 2
    assert sum(by_name["Muse"]["mass_near_retrieved_summaries"]) == pytest.approx(1)
    assert 0 < by_name["Muse"]["gradient_cosine"] < 1
    # All key clusters retrieved: exact attention.
    assert content["settings"][5]["loss_rise"] == pytest.approx(0, abs=1e-5)
    assert content["recommended"] in printed
    assert "| Muse |" in Path("found/compare.md").read_text()
    assert Path("found/compare.png").read_bytes().startswith(b"\x89PNG")
    Path("recipe.yaml").write_text(RECIPE)
    Path("source").mkdir()
    assert main(["fit", "-c", "recipe.yaml", "-c", "found/recommended.yaml", "--print_config"]) == 0
    recommended = next(each for each in content["settings"] if each["name"] == content["recommended"])
    assert f"top_k: {recommended['attention']['init_args']['top_k']}\n" in capsys.readouterr().out


def test_once_more_with_an_exact_layer(folder: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    arguments = [f"--model={folder}", f"--data={dataset}", *OPTIONS, "--exact_layers=[-1]", f"--out={out}"]
    assert main(["compare", *arguments]) == 0
    found = {each["name"]: each for each in json.loads((out / "compare.json").read_text())["settings"]}
    assert list(found)[4:] == [f"{name}; layer -1 exact" for name in list(found)[1:4]]
    for name in list(found)[1:4]:
        alone, again = found[name], found[f"{name}; layer -1 exact"]
        first, last = again["relative_squared_error_by_layer_and_head"]
        assert last == [0.0] * len(last)
        assert first == alone["relative_squared_error_by_layer_and_head"][0]
        assert again["pairs_over_exact"] == pytest.approx((alone["pairs_over_exact"] + 1) / 2)
        assert alone["gradient_cosine"] != again["gradient_cosine"] < 1
        assert again["exact_layers"] == [-1]
        assert again["mass_near_retrieved_summaries"] is None  # of a layer that is exact it would be MuSe's


def test_once_more_with_exact_heads(
    folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"--model={folder}", f"--data={dataset}", *OPTIONS, "--exact_layers=[]", "--exact_heads=1"]
    sweep = ["--sweep=true", *GRID[:3], "--grid.top_k=[1]", "--grid.exact_heads=[0,1,3]", "--max_loss_increase=9"]
    assert main(["compare", *arguments, *sweep, "--out=found"]) == 0
    content = json.loads(Path("found/compare.json").read_text())
    assert content["exact_heads_chosen_on"] not in content["blocks"]
    found = {each["name"]: each for each in content["settings"]}
    rows = ["Muse; 1 head exact", "SpatialBlocks; 1 head exact", "SlidingWindow 16; 1 head exact"]
    assert list(found)[4:] == [*rows, "exact_heads 3"]
    for name in list(found)[1:4]:
        alone, again = found[name], found[f"{name}; 1 head exact"]
        assert (alone["exact_heads"], alone["exact_heads_by_layer"]) == (0, {})
        assert again["exact_heads"] == 1
        [(layer, [head])] = again["exact_heads_by_layer"].items()
        errors = [each["relative_squared_error_by_layer_and_head"] for each in (alone, again)]
        exact = [2 * head, 2 * head + 1]  # two query heads share one
        assert [errors[1][int(layer)][i] for i in exact] == [pytest.approx(0, abs=1e-9)] * 2
        for each in errors:
            del each[int(layer)][exact[0] : exact[1] + 1]
        assert errors[1] == [pytest.approx(each) for each in errors[0]]
        assert again["pairs_over_exact"] == pytest.approx((3 * alone["pairs_over_exact"] + 1) / 4)
        assert again["loss"] != alone["loss"]
        assert alone["gradient_cosine"] != again["gradient_cosine"] < 1
        assert again["mass_near_retrieved_summaries"] is None  # of a head that is exact it would be MuSe's
    assert sum(map(len, found["exact_heads 3"]["exact_heads_by_layer"].values())) == 3
    printed = capsys.readouterr().out
    for name in rows:
        by_layer = ", ".join(f"{layer}: {heads}" for layer, heads in found[name]["exact_heads_by_layer"].items())
        said = f"Exact key-value heads of {name}, by layer: {by_layer}."
        assert said in Path("found/compare.md").read_text()
        assert said in printed
    assert "They are those whose error adds most to the residual stream, not those of the largest error." in printed
    assert "heads of exact_heads 3" not in printed
    assert content["recommended"] == "Muse"
    Path("recipe.yaml").write_text(RECIPE)
    Path("source").mkdir()
    capsys.readouterr()
    only = ["--sweep=true", *GRID[:3], "--grid.top_k=[2]", "--grid.exact_heads=[3]", "--max_loss_increase=9"]
    assert main(["compare", *arguments[:-1], "--muse.top_k=24", *only, "--out=other"]) == 0
    assert json.loads(Path("other/compare.json").read_text())["recommended"] == "top_k 2, exact_heads 3"
    assert main(["fit", "-c", "recipe.yaml", "-c", "other/recommended.yaml", "--print_config"]) == 0
    assert "exact_heads: 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_layers", "options", "again"),
    [
        (2, [], " layer 0 exact"),  # a layer's heads more, and nothing would be left
        (3, [], " layer 0 exact; 2 heads exact"),
        (3, ["--exact_heads=1"], " layer 0 exact; 1 head exact"),
        (3, ["--exact_layers=[-1]"], " layer -1 exact"),
        (3, ["--exact_layers=[]"], None),
        (3, ["--sweep=true", *GRID[:3], "--grid.top_k=[1]", "--grid.exact_layers=[[0],[0,1,2]]"], " layer 0 exact"),
    ],
)
def test_once_more_by_default(
    dataset: Path, tmp_path: Path, num_layers: int, options: list[str], again: str | None
) -> None:
    folder, out = write_model(tmp_path / "model", replace(CONFIG, num_hidden_layers=num_layers)), tmp_path / "found"
    arguments = [f"--model={folder}", f"--data={dataset}", *OPTIONS, "--gradients=false", *options, f"--out={out}"]
    assert main(["compare", *arguments]) == 0
    settings = json.loads((out / "compare.json").read_text())["settings"]
    names = ["Muse", "SpatialBlocks", "SlidingWindow 16"]
    assert [each["name"] for each in settings[4:]] == [f"{name};{again}" for name in names if again]


def test_without_a_setting_under_the_limit(
    folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", f"--model={folder}", f"--data={dataset}", *OPTIONS, "--sweep=true", *GRID[:3]]
    assert main([*arguments, "--grid.top_k=[1]", "--max_loss_increase=-9", f"--out={tmp_path / 'found'}"]) == 0
    assert "No MuSe setting keeps the rise" in capsys.readouterr().out
    assert not (tmp_path / "found" / "recommended.yaml").exists()


def test_a_model_with_a_window_is_compared_with_itself(
    llama: Llama, folder: Path, dataset: Path, tmp_path: Path
) -> None:
    described = config_to_hf(replace(CONFIG, sliding_window=20))
    (folder / "config.json").write_text(json.dumps(described))
    out = tmp_path / "found"
    arguments = [f"--model={folder}", f"--data={dataset}", *OPTIONS, f"--out={out}", "--gradients=false"]
    assert main(["compare", *arguments]) == 0
    first = json.loads((out / "compare.json").read_text())["settings"][0]
    assert first["attention"] == {"class_path": "SlidingWindow", "init_args": {"window": 20}}
    blocks = read_blocks(dataset, "val", SEQ_LEN, 2, document_mask=False, vocab_size=264)
    with llama.attention_as(partial(SlidingWindow, window=20)):
        assert first["loss"] == pytest.approx(losses(llama, blocks, loss_chunk=64).mean, rel=1e-5)


@pytest.mark.parametrize("is_exact", [False, True])
def test_a_short_model_is_compared_on_rows_that_it_is_meant_for(
    folder: Path, dataset: Path, tmp_path: Path, is_exact: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where these are too short for MuSe, that is said first."""
    out = tmp_path / "found"
    arguments = [f"--model={folder}", f"--data={dataset}", *OPTIONS[1:], f"--out={out}", "--gradients=false"]
    arguments += ["--muse.exact_below=128"] * is_exact
    assert main(["compare", *arguments, "--exact_layers=[]"]) == 0
    lines = capsys.readouterr().err.splitlines()
    first = next(number for number, line in enumerate(lines) if "loss" in line)
    assert ["attends these blocks exactly" in line for line in lines[:first]].count(True) == is_exact
    assert json.loads((out / "compare.json").read_text())["seq_len"] == CONFIG.max_position_embeddings == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model=nowhere", "nowhere does not exist"),
        ("--data=nowhere", "nowhere is not a prepared dataset"),
        ("--seq_len=4096", "is meant for at most 128 tokens"),
        ("--seq_len=0", "seq_len: 0 found, at least 1 expected"),
        ("--blocks=0", "blocks: 0 found, at least 1 expected"),
        ("--device=cuda", "device: cuda found, but PyTorch sees no GPU"),
        ("--muse.causal=false", "muse.causal: False found"),
        ("--muse.chunk=24", "chunk / query_cluster must be a power of two"),
        ("--exact_layers=[2]", "exact_layers names layer 2; accepted: 0 to 1, or from the end -1 to -2"),
        ("--exact_heads=5", "exact_heads is 5; accepted: 0 to 2, the key-value heads of layers that are not exact"),
        ("--window=0", "window must be at least 1 token"),
        ("--grid.top_k=[1]", "grid: it is used by a sweep alone"),
        ("--out=tests", "out: tests exists already"),
    ],
)
def test_mistakes(
    folder: Path,
    dataset: Path,
    tmp_path: Path,
    change: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "found"
    arguments = [f"--model={folder}", f"--data={dataset}", *OPTIONS, f"--out={out}", change]
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert message in error
    assert not out.exists()
