"""The small model and dataset of `muse compare`'s tests."""

from tests.compare.conftest import dataset, folder, llama

__all__ = ["dataset", "folder", "llama"]
