"""What a dotted path in a configuration names, and why it names nothing: one line about a module of the user's own."""

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from pkgutil import iter_modules
from types import FunctionType, ModuleType
from typing import Any

from muse_lightning.errors import UserError, alike, reason_of, suggestion


class NotFoundError(Exception):
    """There is no such object. The message says which part of the path is the first that is not there."""


def find_object(name: str, classes: tuple[type, ...], known: Mapping[str, type]) -> Any:
    """The object at a dotted path. Only called for allowed names: its module runs.

    Args:
        name: the path.
        classes: it should name a class below one of these.
        known: such classes by name, for a hint.
    Raises:
        NotFoundError: the module is not there, or has no such object.
        UserError: the module is there, and cannot be imported.
    """
    wanted, _, attribute = name.rpartition(".")
    found = _import(wanted)
    if found is None:
        # A class inside a class.
        outer_module, _, outer = wanted.rpartition(".")
        found = getattr(_import(outer_module), outer, None) if outer_module else None
    if found is None:
        raise NotFoundError(f"there is no module {wanted}{_hint_for_module(wanted, attribute, known)}")
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        hint = _hint_for_object(found, attribute, classes, known)
        raise NotFoundError(f"{wanted} has no {attribute}{hint}") from error
    except ImportError as error:  # Of a package that imports what it has when it is asked for it.
        raise UserError(f"{name} cannot be imported: {type(error).__name__}: {reason_of(error)}") from error


def public_path(cls: type) -> str:
    """The path to import a class from: the shortest of its packages that exports it."""
    parts = cls.__module__.split(".")
    packages = (".".join(parts[: count + 1]) for count in range(len(parts)))
    exported = [package for package in packages if getattr(sys.modules.get(package), cls.__name__, None) is cls]
    return f"{exported[0]}.{cls.__name__}" if exported else f"{cls.__module__}.{cls.__qualname__}"


def making(keys: str) -> Callable[..., Any]:
    """A function that makes an object of a class of the user's own, whose refusal of its arguments is the user's
    mistake.

    Args:
        keys: where the configuration names the class.
    """

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return cls(*args, **kwargs)
        except (TypeError, ValueError) as error:
            name = f"{cls.__module__}.{cls.__qualname__}"
            raise UserError(
                f"{keys}: {name} cannot be made: {type(error).__name__}: {reason_of(error)}{_place(error)}"
            ) from error

    return make


def _import(module: str) -> ModuleType | None:
    """The module; None if it, or a package that it should lie in, is not there.

    Raises:
        UserError: it is there, and cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise UserError(f"{module} cannot be imported: {place}: {type(error).__name__}: {error.msg}") from error
    # SystemExit: of a script that reads its command line as soon as it is imported.
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        if missing and f"{module}.".startswith(f"{missing}."):
            return None
        raise UserError(
            f"{module} cannot be imported: {type(error).__name__}: {reason_of(error)}{_place(error)}"
            f"{_hint_for_import(missing)}"
        ) from error


def _place(error: BaseException) -> str:
    """The innermost line of Python that has to do with an error, in brackets, the user's own rather than a library's;
    nothing where there is none."""
    here = {__file__, importlib.__file__}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in here]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen ")]
    frames = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _hint_for_import(missing: str) -> str:
    """That a module which another one imports lies in the working directory, where only allowed ones are found."""
    top = missing.partition(".")[0]
    if not top or PathFinder.find_spec(top, [str(Path.cwd())]) is None:
        return ""
    return f"; {top} lies in the working directory: to trust it as well, add --allow_module {top}"


def _hint_for_module(module: str, attribute: str, known: Mapping[str, type]) -> str:
    if close := alike(attribute, known):
        return f"; nearest: {', '.join(public_path(known[key]) for key in close)}"
    parent, _, last = module.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", []) if parent else [str(Path.cwd())]
    close = alike(last, [found.name for found in iter_modules(folders)])
    nearest = f"; nearest: {', '.join(f'{parent}.{name}' if parent else name for name in close)}" if close else ""
    return nearest if parent else f" in the working directory or among the installed packages{nearest}"


def _hint_for_object(found: Any, attribute: str, classes: tuple[type, ...], known: Mapping[str, type]) -> str:
    """What the module has that would be accepted, else what else would be."""
    inside = vars(found) if isinstance(found, (ModuleType, type)) else {}
    has = {name: value for name, value in inside.items() if name[0] != "_" and _fits(value, classes)}
    own = [name for name, value in has.items() if value.__module__ == found.__name__]
    if has:
        return suggestion(attribute, own or has)
    if close := alike(attribute, known):
        return f"; nearest: {', '.join(public_path(known[key]) for key in close)}"
    bases = " or ".join(map(public_path, classes))
    return f", nor any class derived from {bases}" if bases else ""


def _fits(value: Any, classes: tuple[type, ...]) -> bool:
    if not classes:
        return isinstance(value, (type, FunctionType))
    return isinstance(value, type) and issubclass(value, classes) and value not in classes
