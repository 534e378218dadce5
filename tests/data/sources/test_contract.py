"""What holds for every source."""

import os
import pickle
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from muse_lightning.data import sources
from muse_lightning.data.documents import DamagedSource, DocumentSource
from muse_lightning.data.sources import (
    Archives,
    Folders,
    GitRepositories,
    PyPIPackages,
    PythonPackages,
    Tables,
    TextDocuments,
)
from tests.data.sources.builders import (
    LIMITS,
    REPOSITORIES,
    commit_all,
    contents,
    git_repository,
    json_lines,
    tar,
    write,
    write_tree,
)

EXPORTED = [
    value
    for name in sources.__all__
    if isinstance(value := getattr(sources, name), type) and issubclass(value, DocumentSource)
]


class Place(NamedTuple):
    """A source of the repositories `alpha` and `trap`, and how to change a file of the first."""

    source: Callable[[], DocumentSource]
    change: Callable[[], object]


def folders(root: Path) -> Place:
    for name, files in REPOSITORIES.items():
        write_tree(root / name, files)
    return Place(lambda: Folders(root), lambda: change_keeping_time(root / "alpha" / "src" / "a.py"))


def text_documents(root: Path) -> Place:
    place = folders(root)
    suffixes = (".md", ".py")
    return Place(lambda: TextDocuments(root, group="top", suffixes=suffixes), place.change)


def archives(root: Path) -> Place:
    for name, files in REPOSITORIES.items():
        sdist(root / f"{name}-1.0.tar.gz", name, files)
    changed = {**REPOSITORIES["alpha"], "src/a.py": b"a = 9\n"}
    return Place(lambda: Archives(root), lambda: sdist(root / "alpha-1.0.tar.gz", "alpha", changed))


def git_repositories(root: Path) -> Place:
    for name, files in REPOSITORIES.items():
        git_repository(root / name, files)

    def change() -> None:
        write(root / "alpha" / "src" / "a.py", b"a = 9\n")
        commit_all(root / "alpha")

    return Place(lambda: GitRepositories([str(root / "*")]), change)


def tables(root: Path) -> Place:
    def rows(name: str, files: dict[str, bytes]) -> list[dict[str, str]]:
        return [{"repo": name, "path": path, "text": content.decode()} for path, content in files.items()]

    for name, files in REPOSITORIES.items():
        json_lines(root / f"{name}.jsonl", rows(name, files))
    changed = {**REPOSITORIES["alpha"], "src/a.py": b"a = 9\n"}
    return Place(
        lambda: Tables([str(root / "*.jsonl")], group="repo", path="path"),
        lambda: json_lines(root / "alpha.jsonl", rows("alpha", changed)),
    )


def pypi_packages(root: Path) -> Place:
    index, cache = root / "simple", root / "cache"

    def publish(name: str, files: dict[str, bytes]) -> None:
        file = sdist(index / name / f"{name}-1.0.tar.gz", name, files)
        write(index / name / "index.html", f'<a href="{file.as_uri()}">{file.name}</a>'.encode())

    def change() -> None:
        publish("alpha", {**REPOSITORIES["alpha"], "src/a.py": b"a = 9\n"})
        for path in (cache / "pypi" / "alpha==1.0").iterdir():
            path.unlink()
            path.parent.rmdir()

    for name, files in REPOSITORIES.items():
        publish(name, files)
    return Place(
        lambda: PyPIPackages([f"{name}==1.0" for name in REPOSITORIES], index_url=str(index), cache=cache), change
    )


def sdist(path: Path, name: str, files: dict[str, bytes]) -> Path:
    return tar(path, [(f"{name}-1.0/{member}", content) for member, content in files.items()])


def change_keeping_time(file: Path) -> None:
    """Same size, modification time put back: only the time of status change tells."""
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b"1", b"9"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


PLACES: dict[type[DocumentSource], Callable[[Path], Place]] = {
    Archives: archives,
    Folders: folders,
    GitRepositories: git_repositories,
    PyPIPackages: pypi_packages,
    PythonPackages: folders,
    Tables: tables,
    TextDocuments: text_documents,
}


def test_every_source_is_covered():
    assert set(EXPORTED) == set(PLACES)
    assert len(EXPORTED) == 7


@pytest.fixture(params=EXPORTED, ids=lambda kind: kind.__name__)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    root = tmp_path / "root"
    place = PLACES[request.param](root)
    monkeypatch.chdir(tmp_path)
    if request.param is PythonPackages:
        write(tmp_path / "library" / "abc.py")
        paths = {"stdlib": str(tmp_path / "library")}
        monkeypatch.setattr(sysconfig, "get_path", lambda name: paths.get(name, str(root)))
        return Place(lambda: PythonPackages(standard_library=False), place.change)
    return place


def names_without_root(found: dict[str, dict[str, bytes]]) -> dict[str, dict[str, bytes]]:
    return {name.rpartition("/")[2]: files for name, files in found.items()}


def test_gives_the_repositories_and_runs_nothing(place: Place, tmp_path: Path):
    before = set(sys.modules)
    found = names_without_root(contents(place.source()))
    only_python = {path: content for path, content in REPOSITORIES["alpha"].items() if path.endswith(".py")}
    assert found["alpha"] in (REPOSITORIES["alpha"], only_python)
    assert found["trap"] == REPOSITORIES["trap"]
    assert not (tmp_path / "trace").exists()
    assert not {"trap", "setup", "alpha"} & (set(sys.modules) - before)


def test_units_are_sorted_named_once_and_can_be_pickled(place: Place):
    units = list(place.source().units())
    names = [os.fsencode(unit.name) for unit in units]
    assert names == sorted(names)
    assert len(set(names)) == len(names) == 2
    for unit in units:
        assert unit.size > 0
        assert read(pickle.loads(pickle.dumps(unit))) == read(unit)


def read(unit) -> list:
    return [
        (repository.name, repository.revision, repository.licence, list(repository.files), repository.skipped)
        for repository in unit.read(LIMITS)
    ]


def test_another_instance_gives_the_same(place: Place):
    one, other = place.source(), place.source()
    assert one.identity() == other.identity()
    assert [(unit.name, unit.stamp) for unit in one.units()] == [(unit.name, unit.stamp) for unit in other.units()]
    assert [read(unit) for unit in one.units()] == [read(unit) for unit in other.units()]


def test_the_stamp_tells_a_change_of_content(place: Place):
    before = {unit.name: unit.stamp for unit in place.source().units()}
    place.change()
    after = {unit.name: unit.stamp for unit in place.source().units()}
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 1
    assert "alpha" in changed[0]
    assert names_without_root(contents(place.source()))["alpha"]["src/a.py"] == b"a = 9\n"


_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(os.path.abspath(os.fsdecode(arguments[0])))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that Python opens during a test. An audit hook cannot be taken back, so it stays and does nothing."""
    global _opened
    if not getattr(sys, "_muse_audit", False):
        sys.addaudithook(_note_opened)
        sys._muse_audit = True
    _opened = []
    yield _opened
    _opened = None


def test_nothing_outside_is_read(place: Place, tmp_path: Path, opened: list[str]):
    secret = write(tmp_path / "secret" / "key.py", b"secret = 1\n")
    root = tmp_path / "root"
    for folder in (root, root / "alpha"):
        if folder.is_dir():
            (folder / "outside").symlink_to(secret.parent)
            (folder / "key.py").symlink_to(secret)
            (folder / "loop").symlink_to(folder)
    opened.clear()
    found = contents(place.source())
    assert len([name for name, files in found.items() if files]) == 2
    assert b"secret" not in b"".join(content for files in found.values() for content in files.values())
    assert any(path.startswith(str(root)) for path in opened) or isinstance(place.source(), GitRepositories)
    assert not [path for path in opened if path.startswith(str(secret.parent))]


def test_a_place_that_is_gone_is_one_line_without_the_name(place: Place, tmp_path: Path):
    units = list(place.source().units())
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    for unit in units:
        with pytest.raises(DamagedSource) as error:
            read(unit)
        assert "\n" not in str(error.value)
        assert str(tmp_path) not in str(error.value)
