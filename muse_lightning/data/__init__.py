"""Data: sources, tokenizers, preparation, and the batches that reach a model."""

from muse_lightning.data.datamodule import TokenDataModule
from muse_lightning.data.documents import Document, DocumentSource, SourceFile

__all__ = ["Document", "DocumentSource", "SourceFile", "TokenDataModule"]
