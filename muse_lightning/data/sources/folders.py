"""A folder of repositories."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muse_lightning.data.documents import DocumentSource, SourceUnit
from muse_lightning.data.sources.local import EXCLUDE, PathRules, folder_unit
from muse_lightning.errors import UserError
from muse_lightning.files import expand_home


class Folders(DocumentSource):
    """One repository per sub-folder of a folder."""

    def __init__(self, path: Path, suffixes: tuple[str, ...] | None = None, exclude: tuple[str, ...] = EXCLUDE) -> None:
        """
        Args:
            path: The folder. Each of its sub-folders is one repository; files that lie directly in it form one more,
                named after it.
            suffixes: Endings of the file names to take, for example [.py, .md]. null takes every file that passes the
                filters.
            exclude: Patterns of folder names to leave out at any depth.
        """
        self.path = expand_home(path)
        self.rules = PathRules(None if suffixes is None else tuple(suffixes), tuple(exclude))

    def identity(self) -> dict[str, Any]:
        return {"class": "Folders", "path": str(self.path.absolute()), **self.rules.identity()}

    def units(self) -> Iterator[SourceUnit]:
        try:
            with os.scandir(self.path) as entries:
                folders = [(entry.name, entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise UserError(
                f"source folder {self.path}: {error.strerror}; give a folder whose sub-folders are repositories"
            ) from error
        # Units of sub-folders end in a slash: the loose files' unit, named after the folder, may share a name.
        places = [(f"{name}/", name, path, True) for name, path in folders if not self.rules.excludes(name)]
        places.append((self.path.absolute().name, self.path.absolute().name, str(self.path), False))
        found = False
        for unit_name, name, path, recursive in sorted(places, key=lambda place: os.fsencode(place[0])):
            unit = folder_unit(unit_name, name, path, self.rules, recursive=recursive)
            found = found or unit.files > 0
            if recursive or unit.entries:
                yield unit
        if not found:
            raise UserError(
                f"source folder {self.path}: no {self.rules.describe()} found; "
                "give a folder whose sub-folders are repositories"
            )
