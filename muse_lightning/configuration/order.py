"""Flags before a --config that sets the same again: arguments count in their order, so that such a flag would be lost.

The files of a command line are usually read as what its flags change, wherever they stand. A flag that changes nothing
is therefore refused.
"""

import dataclasses
import json
from typing import Any

from muse_lightning.configuration.layers import COMMAND_LINE, Layer
from muse_lightning.configuration.redact import arguments_without_credentials

_LONGEST = 100
_CLASS_ARGUMENTS = ".init_args"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value that a layer sets.

    Args:
        path: its whole key, of a class that of what has the class.
        value: as the layer has it; a class as such.
        layer: the argument of the command line that it comes from.
        covers: the key whose value so far is gone, `path` but for arguments that another class does not take.
        with_children: what lies below that key is gone as well: of all but a class, which keeps the arguments that it
            takes.
    """

    path: str
    value: Any
    layer: Layer
    covers: str
    with_children: bool

    @property
    def is_flag(self) -> bool:
        return self.layer.source == COMMAND_LINE

    def replaces(self, other: "Setting") -> bool:
        """Whether this, coming later, leaves nothing of the other."""
        if self.covers.endswith("]"):
            return False  # An item of a list is new: it was appended, or the list is.
        if other.path == self.covers or other.path.startswith(f"{self.covers}["):
            return True
        if self.with_children and other.path.startswith(f"{self.covers}."):
            return True
        # What was null has keys now.
        return other.with_children and self.covers.startswith(f"{other.path}.")

    def repeats(self, other: "Setting") -> bool:
        """Whether both say the same."""
        return self.covers == other.path and (_is_same(self.value, other.value) or str(self.value) == str(other.value))


class Order:
    """What the layers of a command line set, in order."""

    def __init__(self) -> None:
        self._layer: Layer | None = None
        self._settings: list[Setting] = []

    def begin(self, layer: Layer) -> None:
        """`layer` sets what is set from here on, also what is in a file that it names."""
        self._layer = layer

    def set(self, path: str, value: Any, covers: str | None = None, with_children: bool = True) -> None:
        """Note one more value: see `Setting`."""
        assert self._layer is not None
        self._settings.append(Setting(path, value, self._layer, covers or path, with_children))

    def lost_flag(self) -> str | None:
        """The first flag of which a file behind it sets something again, as one line; None if there is none. What the
        file sets to the same value, or another flag sets later, is not lost."""
        end = max((index for index, setting in enumerate(self._settings) if not setting.is_flag), default=0)
        for index, flag in enumerate(self._settings[:end]):
            if not flag.is_flag or self._is_part(flag, index):
                continue
            later = [setting for setting in self._settings[index + 1 :] if setting.replaces(flag)]
            if later and not any(setting.is_flag for setting in later) and not later[-1].repeats(flag):
                return _refusal(flag, later[-1])
        return None

    def _is_part(self, setting: Setting, index: int) -> bool:
        """Whether it is inside a list, or belongs to a class, that the same argument sets."""
        earlier = self._settings[:index]
        return any(whole.layer is setting.layer and whole.replaces(setting) for whole in earlier)


def _is_same(one: Any, other: Any) -> bool:
    """Equal, and not as 1 equals true."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _refusal(flag: Setting, last: Setting) -> str:
    given = " ".join(arguments_without_credentials(flag.layer.given))
    name = flag.layer.given[0].partition("=")[0].lstrip("-")
    sets = "it" if name.replace(_CLASS_ARGUMENTS, "") == last.path.replace(_CLASS_ARGUMENTS, "") else last.path
    value = last.value.__name__ if isinstance(last.value, type) else last.value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    shown = arguments_without_credentials([f"--{last.path}={text}"])[0].partition("=")[2]
    file = " ".join(last.layer.given)
    return f"{_cut(given)} stands before {file}, which sets {sets} to {_cut(shown)}; put it behind"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
