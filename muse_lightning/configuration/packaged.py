"""Packaged files that a configuration may name: recipes as `recipe:demo`, presets as `presets/75m.yaml`."""

from collections.abc import Sequence
from pathlib import Path

from muse_lightning.errors import UserError, suggestion
from muse_lightning.model.presets import preset_names, preset_path

PACKAGE = Path(__file__).parent.parent
RECIPE_PREFIX = "recipe:"
PRESET_PREFIX = "presets/"


def recipes_folder() -> Path:
    """Where the recipes are: inside the package of a wheel, beside it in a checkout or an editable install."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def recipe_path(name: str) -> Path:
    """The file of a packaged recipe.

    Args:
        name: The recipe's path below the recipes folder without its suffix: `demo`, `overlays/smoke`.
    Raises:
        UserError: no recipe has this name.
    """
    names = _recipes()
    if name not in names:
        raise UserError(f"--config: no packaged recipe is called {name!r}{suggestion(name, names)}")
    return names[name]


def namesakes(path: str, key: str) -> list[str]:
    """The packaged files that have the name of a missing one, as `key` may name them."""
    if key == "--config":
        return [RECIPE_PREFIX + recipe for recipe in _recipes() if Path(recipe).name == Path(path).stem]
    return [f"{PRESET_PREFIX}{preset}.yaml" for preset in preset_names() if preset == Path(path).stem]


def _recipes() -> dict[str, Path]:
    folder = recipes_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}


def resolve(value: str) -> str:
    """`value`, or the path of the packaged file that it stands for. A user's own file of the same name comes first."""
    if value.startswith(RECIPE_PREFIX):
        return str(recipe_path(value.removeprefix(RECIPE_PREFIX)))
    if value.startswith(PRESET_PREFIX) and not Path(value).exists():
        return str(preset_path(value.removeprefix(PRESET_PREFIX).removesuffix(".yaml")))
    return value


def resolve_arguments(args: Sequence[str]) -> list[str]:
    """A command line with `recipe:NAME` and `presets/NAME.yaml` replaced by the files that they stand for."""
    resolved = []
    for token in args:
        name, is_assignment, value = token.rpartition("=")
        resolved.append(name + is_assignment + resolve(value))
    return resolved
