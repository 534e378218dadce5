"""Packages of a Python package index by name and version, as source distributions where there are some."""

import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from muse_lightning.data.documents import DocumentSource, SourceUnit
from muse_lightning.data.sources.archives import archive_unit
from muse_lightning.data.sources.downloads import cache_folder
from muse_lightning.data.sources.local import EXCLUDE, PathRules
from muse_lightning.data.sources.package_index import PackageIndex
from muse_lightning.errors import UserError, reason_of
from muse_lightning.files import sha256_file

_CONNECTIONS = 4


class PyPIPackages(DocumentSource):
    """One document per release of a package, from the index that pip is configured for.

    `pip download` runs the build backend of every source distribution to learn its metadata. Here the index is asked
    and the file is fetched, and that is all: nothing of a package is built, imported or run.
    """

    def __init__(
        self,
        packages: list[str],
        suffixes: tuple[str, ...] | None = None,
        exclude: tuple[str, ...] = EXCLUDE,
        index_url: str | None = None,
        cache: Path | None = None,
    ) -> None:
        """
        Args:
            packages: Releases as name==version, with --hash=sha256:... after it if another file is to be refused.
            suffixes: Endings of the names of the files to take, for example [.py, .md]. null takes every file that
                passes the filters.
            exclude: Patterns of folder names to leave out at any depth.
            index_url: The index (simple repository API). null: what pip is configured for, else PyPI.
            cache: Folder that keeps what was fetched. null: muse-lightning in the user's cache folder. A release that
                is there is not asked for again.
        """
        if not packages:
            raise UserError("PyPIPackages: packages is empty; give releases as name==version")
        self.packages = sorted((_Release.parse(text) for text in packages), key=lambda release: release.key)
        for one, other in zip(self.packages, self.packages[1:], strict=False):
            if one.key == other.key:
                raise UserError(f"PyPIPackages: {one.key} is named twice; name each release once")
        self.rules = PathRules(None if suffixes is None else tuple(suffixes), tuple(exclude))
        self.index_url = index_url
        self.cache = cache_folder(cache)

    def identity(self) -> dict[str, Any]:
        return {
            "class": "PyPIPackages",
            "packages": [release.key + (f" {release.sha256}" if release.sha256 else "") for release in self.packages],
            **self.rules.identity(),
        }

    def units(self) -> Iterator[SourceUnit]:
        missing = [release for release in self.packages if self._cached(release) is None]
        if missing:
            index = PackageIndex(self.index_url)
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                # As a list, so that an error of any of them is raised.
                list(pool.map(lambda release: self._fetch(release, index), missing))
        for release in self.packages:
            place = self._cached(release)
            if place is None:
                raise UserError(f"PyPIPackages: {self.cache} was changed while {release.key} was read; start again")
            digest = sha256_file(place)
            if release.sha256 not in ("", digest):
                raise UserError(
                    f"PyPIPackages: {release.key}: SHA-256 {digest} found, {release.sha256} expected; "
                    "pin the file that you have looked at"
                )
            unit = archive_unit(release.key, str(place), self.rules, stamp=digest)
            # The name as the list spells it, should the metadata say none.
            yield replace(unit, declared=unit.declared._replace(name=release.name, version=release.version))

    def _cached(self, release: "_Release") -> Path | None:
        """The release's archive in the cache, if it is there."""
        folder = self.cache / "pypi" / release.key
        return next(folder.iterdir(), None) if folder.is_dir() else None

    def _fetch(self, release: "_Release", index: PackageIndex) -> None:
        """Put a release's archive into the cache, whole or not at all."""
        folder = self.cache / "pypi" / release.key
        partial = folder.with_name(f".{release.key}.{uuid.uuid4().hex[:8]}.partial")
        try:
            partial.mkdir(parents=True)
            index.download(release.name, release.version, partial)
            os.replace(partial, folder)
        except OSError as error:
            # Another preparation was faster; which of the two stays makes no difference.
            if self._cached(release) is None:
                raise UserError(
                    f"PyPIPackages: cannot write {folder}: {reason_of(error)}; choose another cache"
                ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class _Release(NamedTuple):
    """A package at a version."""

    name: str
    version: str
    sha256: str

    @property
    def key(self) -> str:
        return f"{canonicalize_name(self.name)}=={self.version}"

    @classmethod
    def parse(cls, text: str) -> "_Release":
        wanted, _, option = text.partition(" --hash=")
        algorithm, _, digest = option.partition(":")
        try:
            requirement = Requirement(wanted)
        except InvalidRequirement as error:
            raise UserError(f"PyPIPackages: {text!r} found; name==version expected") from error
        pins = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
        if len(pins) != 1 or len(requirement.specifier) != 1 or pins[0].endswith("*") or requirement.url:
            raise UserError(f"PyPIPackages: {text!r} found; name==version expected, with one exact version")
        if option and (algorithm != "sha256" or len(digest) != 64):
            raise UserError(f"PyPIPackages: {text!r}: --hash=sha256: and 64 digits expected")
        return cls(requirement.name, pins[0], digest)
