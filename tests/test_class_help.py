"""What `--trainer.callbacks.help=Class` and its like say of a class."""

import importlib
import pkgutil
from collections.abc import Iterator

from lightning.pytorch.callbacks import Callback

import muse_lightning
from muse_lightning.attention import AttentionStrategy
from muse_lightning.data.documents import DocumentSource


def test_help_of_a_class_is_its_first_line() -> None:
    """jsonargparse shows no more of it, so that a sentence must not go on in the second."""
    for module in pkgutil.walk_packages(muse_lightning.__path__, "muse_lightning."):
        importlib.import_module(module.name)
    found = [cls for base in (Callback, AttentionStrategy, DocumentSource) for cls in subclasses(base)]
    assert len(found) > 35
    broken = [cls.__name__ for cls in found if not (cls.__doc__ or "").split("\n")[0].endswith((".", ":"))]
    assert broken == []


def subclasses(base: type) -> Iterator[type]:
    """Those of the package, which a recipe may name."""
    for cls in base.__subclasses__():
        if cls.__module__.startswith("muse_lightning."):
            yield cls
        yield from subclasses(cls)
