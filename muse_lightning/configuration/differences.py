"""What a recipe says otherwise than the run that it goes on from."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

_NOT_COMPARED = ("run", "ckpt_path", "resume")
# The training says these itself, by what the checkpoint's optimizer has, which another start may have changed.
_SAID_ELSEWHERE = ("model.learning_rate", "model.weight_decay", "model.betas", "model.eps", "model.momentum")
_MISSING = object()
_LONGEST = 60


def differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """One line for each value that differs, which the present recipe wins.

    Args:
        before, now: configurations as YAML has them, nested.
        where: which run the former is of, for the lines.
    """
    return [
        f"{key}: {was} in {where}, {is_now} in this recipe, which wins"
        for key, was, is_now in changed_values(before, now)
        if key not in _SAID_ELSEWHERE
    ]


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Key and both values, as text, of each value that differs, but for those of the start of a run. Of another class
    its name alone, for its arguments are others anyway."""
    old, new = _flat(before, now), _flat(now, before)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key, _MISSING) != new.get(key, _MISSING)]
    classes = [key.removesuffix("class_path") for key in keys if key.endswith(".class_path")]
    return [
        (key, _shown(old.get(key, _MISSING)), _shown(new.get(key, _MISSING)))
        for key in keys
        if key.split(".")[0] not in _NOT_COMPARED and not key.startswith(tuple(f"{name}init_args" for name in classes))
    ]


def _flat(values: Mapping[str, Any], other: Any, prefix: str = "") -> dict[str, Any]:
    """Values by their full keys. A list of groups, as of callbacks, is gone into where `other` has one as well."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        counterpart = other.get(key) if isinstance(other, Mapping) else None
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, counterpart, f"{name}.")
        elif _is_list_of_groups(value) and _is_list_of_groups(counterpart):
            flat |= _flat(_numbered(name, value), _numbered(name, counterpart))
        else:
            flat[name] = value
    return flat


def _is_list_of_groups(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(each, Mapping) for each in value)


def _numbered(name: str, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}[{i}]": group for i, group in enumerate(groups)}


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "not given"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
