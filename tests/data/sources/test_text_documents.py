"""Plain documents: what is one stream, and whose licence counts."""

from pathlib import Path

import pytest

from muse_lightning.data.sources import TextDocuments
from muse_lightning.errors import UserError
from tests.data.sources.builders import LIMITS, contents, counted, write, write_tree

FILES = {
    "LICENSE": b"licence of all\n",
    "intro.md": b"# Intro\n",
    "book/one.tex": b"\\section{One}\n",
    "book/two.tex": b"\\section{Two}\n",
    "book/figure.png": b"\x89PNG\0",
    "book/appendix/a.tex": b"\\section{A}\n",
    "paper/LICENSE": b"licence of the paper\n",
    "paper/main.tex": b"\\documentclass{article}\n",
    ".git/notes.md": b"no\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "texts", FILES)


def test_the_files_of_a_folder_are_one_document(tree):
    assert contents(TextDocuments(tree)) == {
        "texts": {"intro.md": b"# Intro\n"},
        "texts/book": {"one.tex": b"\\section{One}\n", "two.tex": b"\\section{Two}\n"},
        "texts/book/appendix": {"a.tex": b"\\section{A}\n"},
        "texts/paper": {"main.tex": b"\\documentclass{article}\n"},
    }


def test_everything_below_a_top_folder_is_one_document(tree):
    found = contents(TextDocuments(tree, group="top"))
    assert {name: list(files) for name, files in found.items()} == {
        "texts": ["intro.md"],
        "texts/book": ["appendix/a.tex", "one.tex", "two.tex"],
        "texts/paper": ["main.tex"],
    }


def test_each_file_alone(tree):
    found = contents(TextDocuments(tree, group="file"))
    assert set(found) == {
        "texts/intro.md",
        "texts/book/one.tex",
        "texts/book/two.tex",
        "texts/book/appendix/a.tex",
        "texts/paper/main.tex",
    }
    assert found["texts/book/one.tex"] == {"one.tex": b"\\section{One}\n"}


@pytest.mark.parametrize("group", ["folder", "top", "file"])
def test_a_licence_holds_for_the_folders_below(tree, group):
    licences = {}
    for unit in TextDocuments(tree, group=group).units():
        for repository in unit.read(LIMITS):
            licences[repository.name] = [file.content for file in repository.files if file.for_licence]
    below = "texts/book/one.tex" if group == "file" else "texts/book"
    paper = "texts/paper/main.tex" if group == "file" else "texts/paper"
    assert licences[below] == [b"licence of all\n"]
    assert licences[paper][-1] == b"licence of the paper\n"
    before = {unit.name: unit.stamp for unit in TextDocuments(tree, group=group).units()}
    write(tree / "LICENSE", b"another licence\n")
    after = {unit.name: unit.stamp for unit in TextDocuments(tree, group=group).units()}
    assert before["texts/book"] != after["texts/book"]


@pytest.mark.parametrize("group", ["folder", "top", "file"])
def test_what_is_left_out_is_counted_once(tree, group):
    (tree / "book" / "link.tex").symlink_to(tree / "intro.md")
    assert counted(TextDocuments(tree, group=group)) == {"suffix": 1, "symlink": 1, "excluded": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: TextDocuments(root / "none"), "No such file"),
        (lambda root: TextDocuments(write(root / "file")), "Not a directory"),
        (lambda root: TextDocuments(write(root / "a" / "b.c").parent), r"no files that end in .txt, .md, .rst, .tex"),
    ],
    ids=["missing", "file", "empty"],
)
def test_bad_places_are_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as error:
        list(make(tmp_path).units())
    assert "\n" not in str(error.value)
