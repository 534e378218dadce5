"""What a type hint accepts in a configuration: in data for the merge, and in words for a message."""

import dataclasses
import enum
import types
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse.typing import PositiveFloat, PositiveInt

WORDS = {
    type(None): "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    PositiveInt: "an integer above 0",
    PositiveFloat: "a number above 0",
    str: "text",
    Path: "a path",
    timedelta: "a duration",
    dict: "keys with values",
    list: "a list",
    Any: "anything",
}


@dataclasses.dataclass(frozen=True)
class Accepted:
    """What a type hint accepts.

    `classes`: classes that a class path may name a subclass of; `positional`: how many leading arguments of the class
    its user supplies later (a Callable that returns the class); `item`: the hint of a list's elements; `text`: a string
    may also be a plain string; `importable`: a string may name any Python object.
    """

    classes: tuple[type, ...] = ()
    positional: int = 0
    item: Any = None
    text: bool = False
    importable: bool = False

    def __or__(self, other: "Accepted") -> "Accepted":
        return Accepted(
            self.classes + other.classes,
            self.positional or other.positional,
            self.item if self.item is not None else other.item,
            self.text or other.text,
            self.importable or other.importable,
        )


def accepted_by(hint: Any) -> Accepted:
    """What a type hint accepts besides numbers, booleans and null."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        accepted = Accepted()
        for member in args:
            accepted |= accepted_by(member)
        return accepted
    if origin is Callable or hint is Callable:
        returned = accepted_by(args[-1]).classes if args else ()
        return Accepted(returned, len(args[0]) if returned and isinstance(args[0], list) else 0, importable=True)
    if origin is type or hint is type:
        return Accepted(importable=True)
    if origin in (list, Sequence, Iterable, set):
        return Accepted(item=args[0])
    if origin is Literal or hint is str or hint is Any:
        return Accepted(text=True)
    if isinstance(hint, type) and hint not in WORDS and not issubclass(hint, (enum.Enum, Path)):
        return Accepted((hint,))
    return Accepted()


def describe(hint: Any) -> str:
    """The values that a type hint accepts, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        choices = [str(value) for member in args if get_origin(member) is Literal for value in get_args(member)]
        words = [describe(member) for member in args if get_origin(member) is not Literal]
        return " or ".join(
            dict.fromkeys([*(["one of " + ", ".join(dict.fromkeys(choices))] if choices else []), *words])
        )
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in args)
    if origin is tuple:
        return "[" + ", ".join(describe(member) for member in args if member is not Ellipsis) + "]"
    if origin in (list, Sequence, Iterable, set):
        return f"a list, each {describe(args[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    accepted = accepted_by(hint)
    if accepted.classes:
        return f"a class below {accepted.classes[0].__name__}"
    if accepted.importable:
        return "the path of a function or class"
    return WORDS.get(origin or hint, str(hint))
