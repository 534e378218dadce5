"""Plain documents: text, Markdown, reStructuredText, LaTeX; related ones in one stream."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from muse_lightning.data.documents import DamagedSource, DocumentSource, ReadLimits, Repository, SourceFile, SourceUnit
from muse_lightning.data.licences import is_licence_name
from muse_lightning.data.sources.local import (
    EXCLUDE,
    PathRules,
    file_stamp,
    folder_unit,
    read_found,
    read_or_none,
    walk,
)
from muse_lightning.errors import UserError
from muse_lightning.files import expand_home

Grouping = Literal["folder", "top", "file"]


class TextDocuments(DocumentSource):
    """A tree of text files, of which those that belong together are one document.

    These are the chapters of a book, say, or an article and its sections. They are one stream.
    """

    def __init__(
        self,
        path: Path,
        group: Grouping = "folder",
        suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".tex"),
        exclude: tuple[str, ...] = EXCLUDE,
    ) -> None:
        """
        Args:
            path: The root of the tree.
            group: What is one document: the files of one folder, without its sub-folders (folder); everything below a
                sub-folder of the root (top); each file alone (file).
            suffixes: Endings of the file names to take.
            exclude: Patterns of folder names to leave out at any depth.
        """
        self.path = expand_home(path)
        self.group = group
        self.rules = PathRules(tuple(suffixes), tuple(exclude))

    def identity(self) -> dict[str, Any]:
        return {
            "class": "TextDocuments",
            "path": str(self.path.absolute()),
            "group": self.group,
            **self.rules.identity(),
        }

    def units(self) -> Iterator[SourceUnit]:
        root = str(self.path.absolute())
        try:
            os.listdir(root)
        except OSError as error:
            raise UserError(f"TextDocuments: {self.path}: {error.strerror}; give a folder of texts") from error
        found = False
        for folder in self._folders(root):
            unit = _text_unit(root, folder, self.group, self.rules)
            found = found or unit.files > 0
            if unit.files:
                yield unit
        if not found:
            raise UserError(f"TextDocuments: {self.path}: no {self.rules.describe()} found; give a folder of texts")

    def _folders(self, root: str) -> list[str]:
        """The folders that are read one by one, below the root and itself, in the order of their units' names."""
        folders, pending = [""], [""]
        while pending:
            folder = pending.pop()
            try:
                with os.scandir(os.path.join(root, folder)) as entries:
                    below = [
                        e.name for e in entries if e.is_dir(follow_symlinks=False) and not self.rules.excludes(e.name)
                    ]
            except OSError:
                # Counted when it is read.
                continue
            paths = [os.path.join(folder, name) for name in below]
            folders.extend(paths)
            if self.group != "top":
                pending.extend(paths)
        return sorted(folders, key=os.fsencode)


@dataclass(frozen=True)
class _TextUnit(SourceUnit):
    """The texts of one folder."""

    name: str
    size: int
    stamp: str
    files: int
    """Texts when it was listed."""
    root: str
    folder: str
    """Below the root, with forward slashes; empty for the root itself."""
    group: Grouping
    rules: PathRules

    @property
    def recursive(self) -> bool:
        return self.group == "top" and self.folder != ""

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        place = os.path.join(self.root, self.folder)
        if not os.path.isdir(place):
            raise DamagedSource("is gone since it was listed")
        inherited = [
            SourceFile(path, content, for_licence=True)
            for path, location in inherited_licences(self.root, self.folder)
            if (content := read_or_none(location, limits)) is not None
        ]
        found = walk(place, self.rules, recursive=self.recursive)
        if self.group != "file":
            skipped: Counter[str] = Counter()
            yield Repository(self.name, chain(inherited, read_found(found, self.rules, limits, skipped)), skipped)
            return
        entries = list(found)
        texts = [entry for entry in entries if not entry.reason and self.rules.takes(entry.path)]
        others = [entry for entry in entries if entry not in texts]
        licences = [entry for entry in others if not entry.reason and is_licence_name(entry.path)]
        for number, text in enumerate(texts):
            skipped = Counter()
            # What is left out is counted with the first document, licences are for each.
            read = read_found(iter([*(licences if number else others), text]), self.rules, limits, skipped)
            yield Repository(f"{self.name}/{text.path}", chain(inherited, read), skipped)


def _text_unit(root: str, folder: str, group: Grouping, rules: PathRules) -> _TextUnit:
    name = os.path.join(os.path.basename(root), folder).rstrip("/")
    place = os.path.join(root, folder)
    listed = folder_unit(name, name, place, rules, recursive=group == "top" and folder != "")
    digest = hashlib.sha256(listed.stamp.encode())
    for path, location in inherited_licences(root, folder):
        digest.update(f"\0{path}\0{file_stamp(os.lstat(location))}".encode(errors="surrogateescape"))
    return _TextUnit(name, listed.size, digest.hexdigest(), listed.files, root, folder, group, rules)


def inherited_licences(root: str, folder: str) -> list[tuple[str, str]]:
    """Licence files of the nearest folder above one that has any, up to the root: their names, and where they lie."""
    while folder:
        folder = os.path.dirname(folder)
        entries = walk(os.path.join(root, folder), PathRules(), recursive=False)
        found = [(e.path, e.location) for e in entries if not e.reason and is_licence_name(e.path)]
        if found:
            return found
    return []
