"""The Python code that every machine with Python has: the standard library and the packages installed beside it."""

import hashlib
import os
import platform
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import distributions
from itertools import chain, groupby
from typing import Any, NamedTuple

from muse_lightning.data.documents import DocumentSource, ReadLimits, Repository, SourceFile, SourceUnit
from muse_lightning.data.licences import is_licence_name
from muse_lightning.data.sources.declarations import Declaration, read_declaration
from muse_lightning.data.sources.local import (
    FolderUnit,
    Found,
    PathRules,
    file_stamp,
    folder_unit,
    read_found,
    read_or_none,
    walk,
)
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
        self.rules = PathRules(tuple(suffixes), _EXCLUDE + _INSTALLED)

    def identity(self) -> dict[str, Any]:
        return {
            "class": "PythonPackages",
            "standard_library": self.standard_library,
            "installed": self.installed,
            "suffixes": list(self.rules.suffixes or ()),
        }

    def units(self) -> Iterator[SourceUnit]:
        found: list[SourceUnit] = []
        if self.standard_library:
            prefix = sys.implementation.name
            library = sysconfig.get_path("stdlib")
            modules = folder_unit(f"{prefix}/modules", f"{prefix}/modules", library, self.rules, recursive=False)
            units = [*self._packages(library, f"{prefix}/"), *([modules] if modules.files else [])]
            found += [_LibraryUnit(**vars(unit)) for unit in units]
        if self.installed:
            # purelib and platlib are two names of one folder almost everywhere.
            roots = dict.fromkeys(os.path.realpath(sysconfig.get_path(key)) for key in ("purelib", "platlib"))
            for number, root in enumerate(roots):
                packages = self._packages(root, "" if number == 0 else f"{root}/")
                found += [_InstalledUnit(**vars(unit)) for unit in packages]
                loose = _module_unit(root, self.rules)
                if loose.size:
                    found.append(loose)
        if not found:
            raise UserError(
                f"PythonPackages: no {self.rules.describe()} found in {sysconfig.get_path('stdlib')} and "
                f"{sysconfig.get_path('purelib')}; use another source, as Folders"
            )
        yield from sorted(found, key=lambda unit: os.fsencode(unit.name))

    def _packages(self, root: str, prefix: str) -> Iterator[FolderUnit]:
        """One unit per package folder in `root` that holds files."""
        try:
            with os.scandir(root) as entries:
                folders = [(entry.name, entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise UserError(f"PythonPackages: cannot read {root}: {error.strerror}; use another source") from error
        for name, path in sorted(folders):
            if not self.rules.excludes(name):
                repository = name if os.path.isabs(prefix) else prefix + name
                unit = folder_unit(prefix + name, repository, path, self.rules)
                if unit.files:
                    yield unit


@dataclass(frozen=True)
class _LibraryUnit(FolderUnit):
    """A package of the standard library."""

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        # https://docs.python.org/3/license.html
        licence = "PSF-2.0" if sys.implementation.name == "cpython" else None
        for repository in super().read(limits):
            yield replace(repository, licence=licence, revision=platform.python_version())


@dataclass(frozen=True)
class _InstalledUnit(FolderUnit):
    """A package installed in a folder."""

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        for repository in super().read(limits):
            yield _with_declaration(repository, os.path.dirname(self.root), limits)


@dataclass(frozen=True)
class _ModuleUnit(SourceUnit):
    """The modules that lie directly in a folder, each a repository of its own."""

    name: str
    size: int
    stamp: str
    root: str
    rules: PathRules

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        for name, found in groupby(_modules(self.root, self.rules), key=_module_name):
            skipped: Counter[str] = Counter()
            repository = Repository(name, read_found(found, self.rules, limits, skipped), skipped)
            yield _with_declaration(repository, self.root, limits)


def _module_unit(root: str, rules: PathRules) -> _ModuleUnit:
    size = 0
    digest = hashlib.sha256()
    for found in _modules(root, rules):
        if found.status is not None:
            size += found.status.st_size
            digest.update(b"\0" + os.fsencode(found.path) + b"\0" + file_stamp(found.status).encode())
    return _ModuleUnit(f"{root}/*", size, digest.hexdigest(), root, rules)


def _modules(root: str, rules: PathRules) -> list[Found]:
    """Regular files with one of the suffixes, those of one module together."""
    found = [f for f in walk(root, rules, recursive=False) if f.status is not None and rules.takes(f.path)]
    return sorted(found, key=lambda entry: (os.fsencode(_module_name(entry)), os.fsencode(entry.path)))


def _module_name(found: Found) -> str:
    return found.path.partition(".")[0]


def _with_declaration(repository: Repository, root: str, limits: ReadLimits) -> Repository:
    """The repository with its version and licence, and the licence files that lie in its metadata."""
    metadata = _metadata(root).get(repository.name)
    if metadata is None:
        return repository
    licences = (
        SourceFile(f"{metadata.folder}/{entry.path}", content, for_licence=True)
        for entry in walk(os.path.join(root, metadata.folder), PathRules())
        if entry.status is not None and is_licence_name(entry.path)
        if (content := read_or_none(entry.location, limits)) is not None
    )
    return replace(
        repository,
        files=chain(licences, repository.files),
        licence=metadata.declared.licence,
        revision=metadata.declared.version or "",
    )


class _Metadata(NamedTuple):
    """What is known of an installed package."""

    folder: str
    """Its .dist-info, beside it."""
    declared: Declaration


@lru_cache(maxsize=4)
def _metadata(root: str) -> dict[str, _Metadata]:
    """The metadata of the top-level packages and modules in a folder."""
    found: dict[str, _Metadata] = {}
    for distribution in distributions(path=[root]):
        metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        declared = read_declaration("METADATA", metadata.encode(errors="surrogateescape"))
        files = [path for path in distribution.files or () if path.parts]
        folder = next((path.parts[0] for path in files if path.parts[0].endswith(".dist-info")), None)
        if folder is not None:
            found |= {path.parts[0].partition(".")[0]: _Metadata(folder, declared) for path in files}
    return found
