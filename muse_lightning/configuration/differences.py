"""What a recipe says otherwise than the run that it goes on from."""

from collections.abc import Mapping
from typing import Any

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
    old, new = _flat(before), _flat(now)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key.split(".")[0] in _NOT_COMPARED or key in _SAID_ELSEWHERE:
            continue
        was, is_now = old.get(key, _MISSING), new.get(key, _MISSING)
        if was != is_now:
            lines.append(f"{key}: {_shown(was)} in {where}, {_shown(is_now)} in this recipe, which wins")
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "not given"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
