"""What the fuzzers have found, and a few inputs that they begin from, read again."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.readers import CORPUS, READERS, read
from tests.fuzz.recipe_cases import Case
from tests.fuzz.recipes import Target, target

INPUTS = [path for name in READERS for path in sorted((CORPUS / name).iterdir())]
CASES = sorted((CORPUS / "recipes").iterdir())


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_readers(tmp_path: Path, path: Path) -> None:
    name = path.parent.name
    accepted = read(name, path.read_bytes(), tmp_path)
    # litdata's index is accepted by a digest that no input has; a damaged checkpoint is named and passed over.
    expected = {"litdata_index": False, "checkpoint_manifest": True}.get(name, path.stem.startswith("seed"))
    assert accepted == expected


@pytest.fixture(scope="module")
def command_lines() -> Iterator[Target]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with target() as under_test:
            yield under_test


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_command_lines(command_lines: Target, path: Path) -> None:
    case = json.loads(path.read_text())
    expected = case.pop("expected")
    assert command_lines.run(Case(**case)) == expected
