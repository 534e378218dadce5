"""The --config files and flags of a command line as they were given, in order: layers, of which the later wins."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from muse_lightning.bounded_yaml import OutOfBounds, check_bounds, load_bounded
from muse_lightning.configuration.packaged import PRESET_PREFIX, namesakes, resolve
from muse_lightning.errors import UserError, suggestion

COMMAND_LINE = "command line"
_load = get_loader("yaml")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One --config file, or one flag: later layers win.

    `source` is the file's name or "command line"; paths inside `values` are relative to `folder`; `given` are the
    arguments that say so, none of a file that another layer names.
    """

    source: str
    values: dict[str, Any]
    folder: Path
    given: tuple[str, ...] = ()


def read_layers(args: Sequence[str], positional: Sequence[str] = ()) -> list[Layer]:
    """The --config files and flags of a command line, in order. `positional` names what is given without a flag.

    Raises:
        UserError: a file is missing, is not YAML, or does not hold a mapping.
    """
    layers = []
    here = Path.cwd()
    tokens, unnamed = list(args), list(positional)
    while tokens:
        token = tokens.pop(0)
        name, has_value, value = token.partition("=")
        if token.startswith("-c") and not token.startswith("--"):
            name, has_value, value = "--config", token[2:], token[2:].removeprefix("=")
        if not name.startswith("--"):
            layers.append(Layer(COMMAND_LINE, {unnamed.pop(0) if unnamed else token: token}, here, (token,)))
            continue
        if name == "--print_config" or name.endswith((".help", "--help")):
            continue
        given: tuple[str, ...] = (token,)
        if not has_value:
            value = "null"
            if tokens and not tokens[0].startswith("--"):
                value = tokens.pop(0)
                given = (token, value)
        if name == "--config" and value == "null":
            raise UserError("--config: a file or recipe:NAME must follow")
        if name == "--config":
            folder = Path(value).resolve().parent
            layers.append(Layer(value, load_yaml(value, "--config", here), folder, (name, value)))
        else:
            layers.append(Layer(COMMAND_LINE, _nested(name[2:].split("."), _parse(value, name)), here, given))
    return layers


def use_loader() -> None:
    """Let jsonargparse read values and files as `read_layers` does."""
    set_loader("yaml", load_with_presets, exceptions=(yaml.YAMLError,))


def is_file(path: Path) -> bool:
    """Whether there is such a file, also of what can be no path: a flag's value is a file's name or something else."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def load_with_presets(text: str) -> Any:
    """What YAML text says. `config: presets/NAME.yaml` becomes the path of the packaged file.

    Raises:
        yaml.YAMLError: it is not YAML, or exceeds the bounds of `bounded_yaml`.
    """
    values = load_bounded(text, _load)
    _resolve_presets(values)
    return values


def load_yaml(path: str, key: str, folder: Path) -> dict[str, Any]:
    """The mapping in a YAML file that `key` named, relative to `folder`.

    Raises:
        UserError: the file is missing or unreadable, is not YAML, or does not hold a mapping.
    """
    file = folder / path
    if not is_file(file):
        given = Path(path).parent
        others = [] if given.is_absolute() else [str(given / name) for name in _yaml_files(file.parent)]
        packaged = namesakes(path, key)
        hint = f"; packaged: {', '.join(packaged)}" if packaged else suggestion(path, others)
        raise UserError(f"{key}: no file {path:.300}{hint}")
    try:
        values = load_with_presets(file.read_text(encoding="utf-8"))
        _check_texts(values)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{key}: {path} is not YAML{position}: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{key}: cannot read {path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{key}: {path} holds {values!r:.60}; expected keys with values, such as `trainer:`")
    return values


def _yaml_files(folder: Path) -> list[str]:
    try:
        return [file.name for file in folder.glob("*.yaml")]
    except (OSError, ValueError):
        return []


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _parse(value: str, name: str) -> Any:
    try:
        values = load_with_presets(value)
        _check_texts(values)
    except OutOfBounds as error:
        raise UserError(f"{name}: {value!r:.60} is refused: {error}") from None
    except yaml.YAMLError:
        return value
    return values


def _check_texts(values: Any) -> None:
    """Bounds of the texts in a configuration: jsonargparse reads each as YAML where its type is no text.

    Raises:
        OutOfBounds: one exceeds them, or has a null byte, which no path can have.
    """
    if isinstance(values, str):
        if "\0" in values:
            raise OutOfBounds(f"{values!r:.60} has a null byte")
        try:
            check_bounds(values)
        except OutOfBounds:
            raise
        except yaml.YAMLError:
            return  # A text after all.
    elif isinstance(values, Mapping):
        for key, value in values.items():
            _check_texts(key)
            _check_texts(value)
    elif isinstance(values, Iterable) and not isinstance(values, bytes):
        for value in values:
            _check_texts(value)


def _resolve_presets(values: Any) -> None:
    if isinstance(values, dict):
        for key, value in values.items():
            if key == "config" and isinstance(value, str) and value.startswith(PRESET_PREFIX):
                values[key] = resolve(value)
            _resolve_presets(value)
