"""Every recipe parses, states real parameters, and trains for two steps; twins differ in the attention alone."""

import io
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning.cli import main

RECIPES = Path(__file__).parent.parent / "recipes"
WHOLE = sorted(RECIPES.glob("*.yaml"))
OVERLAYS = sorted((RECIPES / "overlays").glob("*.yaml"))
DATA = sorted((RECIPES / "data").glob("*.yaml"))
SOURCES = sorted((RECIPES / "data" / "sources").glob("*.yaml"))
SMOKE = RECIPES / "overlays" / "smoke.yaml"
DENSE = sorted(RECIPES.glob("*-dense.yaml"))

MUSE_AT_256_TOKENS = [
    f"--model.attention.{key}={value}"
    for key, value in {"chunk": 32, "query_cluster": 8, "key_cluster": 8, "top_k": 2, "exact_below": 32}.items()
]
"""Several chunks in the short context of the smoke overlay, where the recipes' own sizes would be all exact."""


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value; a list is a value, of which the maps inside are compared as a whole."""
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}.{key}".lstrip("."))
    return found


def print_config(*files: Path) -> dict[str, Any]:
    flags = [flag for file in files for flag in ("--config", str(file))]
    with redirect_stdout(io.StringIO()) as text:
        assert main(["fit", *flags, "--print_config"]) == 0
    return yaml.safe_load(text.getvalue())


def test_all_recipes_are_found() -> None:
    assert len(WHOLE) == 15
    assert len(DENSE) == 7
    assert len(OVERLAYS) == 3
    assert len(DATA) == 5
    assert len(SOURCES) == 3
    assert len(list(RECIPES.rglob("*.yaml"))) == len(WHOLE) + len(OVERLAYS) + len(DATA) + len(SOURCES)


def normalised(value: Any) -> Any:
    """Classes by their bare name and class with its arguments, as a user may write them."""
    if isinstance(value, dict):
        if "class_path" in value and not value.get("init_args"):
            return value["class_path"].rpartition(".")[2]
        return {key: normalised(inner) for key, inner in value.items() if key != "init_args" or inner}
    if isinstance(value, list):
        return [normalised(inner) for inner in value]
    return value.rpartition(".")[2] if isinstance(value, str) and value.startswith("muse_lightning.") else value


@pytest.mark.parametrize("recipe", [*WHOLE, *OVERLAYS], ids=lambda path: path.stem)
def test_every_leaf_is_a_parameter(recipe: Path) -> None:
    """What a recipe says stands in the parsed configuration, at the same place and with the same value."""
    base = [] if recipe in WHOLE else [RECIPES / "demo.yaml"]
    parsed = leaves(print_config(*base, recipe))
    stated = leaves(yaml.safe_load(recipe.read_text()))
    assert len(stated) > (15 if recipe in WHOLE else 0)
    for path, value in stated.items():
        if path == "model.attention":
            path += ".class_path"
        if path.endswith("+"):  # added to what the recipe before it has
            parsed[path] = parsed[path.removesuffix("+")][-len(value) :]
        assert path in parsed, f"{path} is no parameter"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            assert [item["class_path"] for item in value] == [
                item["class_path"].rpartition(".")[2] for item in parsed[path]
            ]
        else:
            assert normalised(parsed[path]) == normalised(value), path


@pytest.mark.parametrize("recipe", WHOLE, ids=lambda path: path.stem)
def test_short_contexts_come_first_where_a_model_starts_from_nothing(recipe: Path) -> None:
    stated = yaml.safe_load(recipe.read_text())
    found = {each["class_path"]: each.get("init_args") for each in stated["trainer"].get("callbacks", [])}
    assert ("ContextWarmup" in found) != ("weights" in stated["model"])
    if arguments := found.get("ContextWarmup"):
        assert arguments["start"] < stated["data"]["seq_len"]
        assert arguments["steps"] < 0.6 * stated["trainer"]["max_steps"]
        assert arguments.get("exact", False) == (recipe.stem != "demo")


@pytest.mark.parametrize("recipe", [path for path in WHOLE if path.stem != "demo"], ids=lambda path: path.stem)
def test_the_first_layer_is_exact_and_as_many_heads_as_it_has(recipe: Path) -> None:
    model = yaml.safe_load(recipe.read_text())["model"]
    assert model["exact_layers"] == [0]
    assert model["exact_heads"] == model["config"]["num_key_value_heads"]


@pytest.mark.parametrize("recipe", [*WHOLE, SMOKE], ids=lambda path: path.stem)
def test_the_last_step_is_validated(recipe: Path) -> None:
    trainer = yaml.safe_load(recipe.read_text())["trainer"]
    assert trainer["max_steps"] * trainer["accumulate_grad_batches"] % trainer["val_check_interval"] == 0


@pytest.mark.parametrize("recipe", DATA, ids=lambda path: path.stem)
def test_data_is_prepared_without_a_model(recipe: Path) -> None:
    """A recipe of data alone parses, its values stand where it says, and every file in its lists is pinned."""
    verb = ["tokenizer", "train"] if recipe.stem.endswith("-tokenizer") else ["prepare"]
    with redirect_stdout(io.StringIO()) as text:
        assert main([*verb, "--config", str(recipe), "--print_config"]) == 0
    parsed = leaves(yaml.safe_load(text.getvalue()))
    stated = leaves(yaml.safe_load(recipe.read_text()))
    assert len(stated) >= 10
    at = "sources" if "sources" in stated else "data.sources"
    (file,) = stated.pop(at)
    (source,) = parsed[at]
    assert (
        normalised(source)["class_path"].rpartition(".")[2]
        == yaml.safe_load((recipe.parent / file).read_text())["class_path"]
    )
    arguments = source["init_args"]
    pins = [package.partition("sha256:")[2] for package in arguments.get("packages") or []]
    pins += [download["sha256"] for download in arguments.get("downloads") or []]
    assert len(pins) > 15
    assert all(len(pin) == 64 for pin in pins)
    assert {path: parsed[path] for path in stated} == stated


@pytest.mark.parametrize("dense", DENSE, ids=lambda path: path.stem)
def test_twins_differ_in_the_attention_alone(dense: Path) -> None:
    muse = yaml.safe_load(dense.with_name(dense.name.replace("-dense", "-muse")).read_text())
    twin = yaml.safe_load(dense.read_text())
    assert twin["model"].pop("attention") == "Dense"
    assert muse["model"].pop("attention")["class_path"] == "Muse"
    assert twin == muse


# Of the dense ones one: they differ from their twins in the attention alone.
@pytest.mark.parametrize(
    "recipe", [*(recipe for recipe in WHOLE if recipe not in DENSE), DENSE[0]], ids=lambda path: path.stem
)
def test_it_trains_for_two_steps(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for repository in range(6):
        folder = tmp_path / "repositories" / f"repository_{repository}"
        folder.mkdir(parents=True)
        for file in range(4):
            lines = [f"def function_{i}(x):\n    return x + {1000 * repository + i * file}\n" for i in range(40)]
            (folder / f"module_{file}.py").write_text("\n".join(lines))
    flags = [] if recipe in DENSE else MUSE_AT_256_TOKENS
    assert main(["fit", "--config", str(recipe), "--config", str(SMOKE), *flags]) == 0
    run = tmp_path / "runs" / "smoke" / "version_0"
    events = EventAccumulator(str(run)).Reload()
    for tag, count in (("train/loss", 2), ("val/loss", 1), ("val/loss_exact", 1), ("val/bpb", 1)):
        values = [event.value for event in events.Scalars(tag)]
        assert len(values) == count, tag
        assert all(math.isfinite(value) for value in values), tag
    assert list((run / "checkpoints").glob("step=2.ckpt"))
