"""Data: sources, tokenizers, preparation, and the batches that reach a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from muse_lightning.data.documents import DocumentSource, Repository, SourceFile, SourceUnit

if TYPE_CHECKING:
    from muse_lightning.data.datamodule import TokenDataModule

__all__ = ["DocumentSource", "Repository", "SourceFile", "SourceUnit", "TokenDataModule"]


def __getattr__(name: str) -> Any:
    # Processes that prepare data import this package, and neither torch nor Lightning: each would cost them seconds and
    # hundreds of megabytes.
    if name == "TokenDataModule":
        return import_module("muse_lightning.data.datamodule").TokenDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
