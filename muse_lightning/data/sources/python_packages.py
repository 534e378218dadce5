"""The Python code that every machine with Python has: the standard library and the packages installed beside it."""

import os
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

from muse_lightning.data.documents import Document, DocumentSource, SourceFile
from muse_lightning.data.sources.local import is_excluded, list_folder
from muse_lightning.errors import UserError

_EXCLUDE = (".*", "__pycache__", "*.dist-info", "*.egg-info", "*.libs")
# Where installed packages live when that folder is inside the standard library's.
_INSTALLED = ("site-packages", "dist-packages")


class PythonPackages(DocumentSource):
    """The running interpreter's standard library and the packages installed beside it.

    Each top-level package of the standard library is one repository (`cpython/asyncio`), its single-file modules
    together are one (`cpython/modules`). Each installed package or single-file module is one repository under its own
    name (`torch`, `six`).
    """

    def __init__(
        self, standard_library: bool = True, installed: bool = True, suffixes: tuple[str, ...] = (".py", ".pyi")
    ) -> None:
        """
        Args:
            standard_library: Whether to take the standard library.
            installed: Whether to take the packages installed beside it (site-packages).
            suffixes: Endings of the file names to take.
        """
        if not (standard_library or installed):
            raise UserError("PythonPackages: standard_library and installed are both false; set one of them to true")
        self.standard_library = standard_library
        self.installed = installed
        self.suffixes = suffixes

    def identity(self) -> dict[str, Any]:
        return {
            "class": "PythonPackages",
            "standard_library": self.standard_library,
            "installed": self.installed,
            "suffixes": list(self.suffixes),
        }

    def documents(self) -> Iterator[Document]:
        found: list[Document] = []
        if self.standard_library:
            prefix = sys.implementation.name
            found += self._top_level(sysconfig.get_path("stdlib"), f"{prefix}/", modules_as=f"{prefix}/modules")
        if self.installed:
            # purelib and platlib are two names of one folder almost everywhere.
            roots = dict.fromkeys(os.path.realpath(sysconfig.get_path(key)) for key in ("purelib", "platlib"))
            for root in roots:
                found += self._top_level(root, "", modules_as=None)
        found = [document for document in found if document.files]
        if not found:
            raise UserError(
                f"PythonPackages: no files that end in {', '.join(self.suffixes)} found in "
                f"{sysconfig.get_path('stdlib')} and {sysconfig.get_path('purelib')}; use another source, as Folders"
            )
        yield from sorted(found, key=lambda document: os.fsencode(document.name))

    def _top_level(self, root: str, prefix: str, modules_as: str | None) -> list[Document]:
        """One document per package folder in `root`; modules together under one name, or each under its own."""
        exclude = _EXCLUDE + _INSTALLED
        try:
            entries = sorted(os.scandir(root), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise UserError(f"PythonPackages: cannot read {root}: {error.strerror}; use another source") from error
        documents = [
            list_folder(prefix + entry.name, entry.path, suffixes=self.suffixes, exclude=exclude)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not is_excluded(entry.name, exclude)
        ]
        modules = list_folder(modules_as or "", root, suffixes=self.suffixes, exclude=exclude, recursive=False)
        if modules_as is not None:
            return [*documents, modules]
        by_name: dict[str, list[SourceFile]] = {}
        for file in modules.files:
            by_name.setdefault(file.path.partition(".")[0], []).append(file)
        return [*documents, *(Document(name, tuple(files)) for name, files in by_name.items())]
