"""Triton's interpreter without what it works out anew each time: four tenths of its time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Nothing that a kernel computes is other; nothing happens where there is no such interpreter."""
    try:
        tl = import_module("triton.language")
        interpreter = import_module("triton.runtime.interpreter")
    except ModuleNotFoundError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(interpreter, "_LangPatchScope"):  # in other versions it is made another way
            patch.setattr(interpreter, "_patch_lang", _patched_once(tl, interpreter))
        if hasattr(interpreter, "_get_np_dtype"):
            patch.setattr(interpreter, "_get_np_dtype", _looked_up_once(tl, interpreter._get_np_dtype))
        yield


def _patched_once(tl: Any, interpreter: Any) -> Callable[..., Any]:
    """The interpreter puts its own functions into the language at a kernel's launch, takes them out at its end, and
    puts them in once more at every call of a function in between."""
    patch_language = interpreter._patch_lang
    done: set[frozenset[str]] = set()
    """Languages, by the modules that a function sees, since the kernel was launched."""

    @cache
    def seen_by(function: Callable[..., Any]) -> frozenset[str]:
        values = function.__globals__.values()
        return frozenset(each.__name__ for each in (tl, tl.core) if any(value is each for value in values))

    def patch_once(function: Callable[..., Any]) -> Any:
        seen = seen_by(function)
        if seen in done:
            return interpreter._LangPatchScope()
        done.add(seen)
        scope = patch_language(function)
        restore = scope.restore

        def restore_and_forget() -> None:
            done.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    return patch_once


def _looked_up_once(tl: Any, numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """It makes the table of NumPy's dtypes for each look at it."""
    of_scalar = cache(numpy_dtype)

    def look_up(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return numpy_dtype(element) if isinstance(element, tl.pointer_type) else of_scalar(element)

    return look_up
