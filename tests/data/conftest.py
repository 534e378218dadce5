"""Repositories made of reproducible pseudo-text, and datasets prepared from them."""

import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muse_lightning.data import TokenDataModule
from muse_lightning.data.sources import Folders

_WORDS = ["import", "return", "def", "class", "self", "value", "index", "token", "chunk", "width", "é", "漢"]


def write_repositories(root: Path, count: int = 8, seed: int = 0) -> Path:
    """`count` repositories of a few kilobytes each below `root`."""
    rng = random.Random(seed)
    for number in range(count):
        for file in range(rng.randint(1, 4)):
            path = root / f"repo{number}" / f"pkg{file % 2}" / f"file{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [" ".join(rng.choices(_WORDS, k=8)) for _ in range(rng.randint(20, 60))]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    return write_repositories(tmp_path / "repositories")


@pytest.fixture
def make_data(tmp_path: Path, repositories: Path) -> Callable[..., TokenDataModule]:
    """Data modules on one dataset folder, prepared from `repositories`; arguments override."""

    def make(**arguments) -> TokenDataModule:
        defaults = {
            "dataset": tmp_path / "dataset",
            "sources": [Folders(repositories)],
            "seq_len": 64,
            "batch_size": 2,
            "val_fraction": 0.2,
            "chunk_bytes": 8000,
        }
        return TokenDataModule(**{**defaults, **arguments})

    return make


@pytest.fixture
def longest_file() -> Iterator[Callable[[int], None]]:
    """Sets the longest file that this process may write, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared dataset that tests only read, with two chunks or more in `train` and in `val`."""
    root = tmp_path_factory.mktemp("prepared")
    return prepare_small(root, seed=0)


@pytest.fixture(scope="session")
def other_prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, of other text."""
    root = tmp_path_factory.mktemp("other")
    return prepare_small(root, seed=1)


def prepare_small(root: Path, seed: int) -> Path:
    """Prepare a dataset of pseudo-text in `root`."""
    sources = [Folders(write_repositories(root / "repositories", seed=seed))]
    dataset = root / "dataset"
    data = TokenDataModule(
        str(dataset),
        sources,
        seq_len=1,
        batch_size=1,
        val_fraction=0.3,
        max_document_bytes=6000,
        chunk_bytes=6000,
    )
    data.prepare_data()
    return dataset
