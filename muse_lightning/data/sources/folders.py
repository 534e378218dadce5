"""A folder of repositories."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muse_lightning.data.documents import Document, DocumentSource
from muse_lightning.data.sources.local import is_excluded, list_folder
from muse_lightning.errors import UserError

# Version control, environments and caches: nothing that people wrote.
_EXCLUDE = (".*", "__pycache__", "node_modules", "*.egg-info")


class Folders(DocumentSource):
    """One repository per sub-folder of a folder."""

    def __init__(
        self, path: Path, suffixes: tuple[str, ...] | None = None, exclude: tuple[str, ...] = _EXCLUDE
    ) -> None:
        """
        Args:
            path: The folder. Each of its sub-folders is one repository; files that lie directly in it form one more,
                named after it.
            suffixes: Endings of the file names to take, for example [.py, .md]. null takes every file that passes the
                filters.
            exclude: Patterns of folder names to leave out at any depth.
        """
        self.path = path.expanduser()
        self.suffixes = suffixes
        self.exclude = exclude

    def identity(self) -> dict[str, Any]:
        return {
            "class": "Folders",
            "path": str(self.path.absolute()),
            "suffixes": None if self.suffixes is None else list(self.suffixes),
            "exclude": list(self.exclude),
        }

    def documents(self) -> Iterator[Document]:
        try:
            entries = sorted(os.scandir(self.path), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise UserError(
                f"source folder {self.path}: {error.strerror}; give a folder whose sub-folders are repositories"
            ) from error
        repositories = [
            (entry.name, entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not is_excluded(entry.name, self.exclude)
        ]
        found = [list_folder(name, path, suffixes=self.suffixes, exclude=self.exclude) for name, path in repositories]
        loose = list_folder(
            self.path.absolute().name, str(self.path), suffixes=self.suffixes, exclude=self.exclude, recursive=False
        )
        found = sorted([*found, loose], key=lambda document: os.fsencode(document.name))
        if not any(document.files for document in found):
            wanted = "files" if self.suffixes is None else f"files that end in {', '.join(self.suffixes)}"
            raise UserError(
                f"source folder {self.path}: no {wanted} found; give a folder whose sub-folders are repositories"
            )
        yield from (document for document in found if document.files or document.skipped)
