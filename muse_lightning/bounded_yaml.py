"""YAML that anybody may have written: nested and repeated within bounds, and one kind of error whatever is wrong. All
packages may import this file.

PyYAML's safe loader runs no code, but a few lines of aliases that repeat aliases mean more than a memory holds, a value
may contain itself, and a few thousand brackets exhaust the stack of whoever walks through them.
"""

from collections.abc import Callable
from typing import Any

import yaml

MAX_DEPTH = 64
MAX_VALUES = 100_000
"""In a whole text, each as often as an alias repeats it."""


class OutOfBounds(yaml.YAMLError):
    """It may be YAML, but means too much."""


_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_bounded(text: str, construct: Callable[[str], Any] = yaml.safe_load) -> Any:
    """What YAML text says.

    Args:
        construct: makes values of a text that is known to be within the bounds.
    Raises:
        OutOfBounds: it exceeds the bounds.
        yaml.YAMLError: it is not YAML, or has a tag that does not fit its value.
    """
    check_bounds(text)
    try:
        return construct(text)
    except yaml.YAMLError:
        raise
    except Exception as error:
        # PyYAML's constructors raise anything: `!!int x` a ValueError, `!!bool x` a KeyError, `!!int ''` an IndexError.
        raise yaml.YAMLError(f"a value does not fit its tag: {' '.join(str(error).split())[:100]}") from error


def check_bounds(text: str) -> None:
    """Follow the events of a text, without building what it says.

    Raises:
        OutOfBounds: it exceeds the bounds.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) <= MAX_DEPTH and "*" not in text:
        return  # Too short to be deep, and nothing is repeated: a flag's value, of which a command line has many.
    known: dict[str | None, tuple[int, int]] = {}  # anchor -> number of values and depth of what it names
    open_anchors: list[str | None] = []
    open_sizes = [(0, 0)]
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append(event.anchor)
            open_sizes.append((1, 0))
            if len(open_anchors) > MAX_DEPTH:
                raise OutOfBounds(f"nested deeper than {MAX_DEPTH}")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, (values, depth) = open_anchors.pop(), open_sizes.pop()
            size = values, depth + 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in open_anchors:
                raise OutOfBounds(f"*{event.anchor:.40} is a part of itself")
            anchor, size = None, known.get(event.anchor, (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, (1, 0)
        else:
            continue
        if anchor is not None:
            known[anchor] = size
        values, depth = open_sizes[-1]
        open_sizes[-1] = values + size[0], max(depth, size[1])
        if open_sizes[-1][0] > MAX_VALUES:
            raise OutOfBounds(f"more than {MAX_VALUES:,} values, aliases counted each time")
        if len(open_anchors) + size[1] > MAX_DEPTH:
            raise OutOfBounds(f"nested deeper than {MAX_DEPTH}")
