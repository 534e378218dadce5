"""Source distributions, wheels, npm tarballs, Debian's sources and other archives, each one repository."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from muse_lightning.data.documents import DocumentSource, ReadLimits, Repository, SourceFile, SourceUnit
from muse_lightning.data.licences import is_licence_name
from muse_lightning.data.sources import declarations
from muse_lightning.data.sources.archive_members import Member, open_members
from muse_lightning.data.sources.declarations import Declaration, read_declaration
from muse_lightning.data.sources.downloads import Download, cache_folder, fetch
from muse_lightning.data.sources.local import EXCLUDE, PathRules, clean_path, file_stamp, walk
from muse_lightning.errors import UserError, reason_of
from muse_lightning.files import expand_home

_ENDINGS = re.compile(r"\.(?:tar|tar\.(?:gz|bz2|xz|zst)|tgz|tbz2?|txz|zip|whl|crate)$")
# "requests-2.32.5", "coreutils_9.1.orig": a name, then what begins with a digit.
_VERSIONED = re.compile(r"(?P<name>.+?)[-_](?P<version>v?\d.*)")
_METADATA_FOLDER = re.compile(r"[^/]+\.(?:dist|egg)-info/")
# Longer metadata files are read as text only.
_MAX_METADATA_BYTES = 1 << 18


class Archives(DocumentSource):
    """One repository per archive: .tar, .tar.gz, .tar.bz2, .tar.xz, .tar.zst, .zip, source distributions, wheels.

    Members are read one by one and never written to disk; links, devices and paths that leave the archive are
    counted. The folder that all members share (`name-1.0/`) is dropped from their paths. The repository's name,
    version and licence are those of the package's metadata (PKG-INFO, METADATA, package.json) where there is one;
    otherwise the name is the file's, up to its version.
    """

    def __init__(
        self,
        path: Path | None = None,
        downloads: list[Download] | None = None,
        suffixes: tuple[str, ...] | None = None,
        exclude: tuple[str, ...] = EXCLUDE,
        cache: Path | None = None,
    ) -> None:
        """
        Args:
            path: A folder, searched at any depth, or one archive.
            downloads: Archives to fetch: url (https, s3, gs, file; through fsspec) and sha256 of each.
            suffixes: Endings of the names of the members to take, for example [.py, .md]. null takes every member that
                passes the filters.
            exclude: Patterns of names of folders in the archives to leave out at any depth.
            cache: Folder that keeps what was fetched. null: muse-lightning in the user's cache folder.
        """
        if path is None and not downloads:
            raise UserError(
                "Archives: neither path nor downloads is given; name a folder of archives or files to fetch"
            )
        self.path = None if path is None else expand_home(path)
        self.downloads = list(downloads or ())
        self.rules = PathRules(None if suffixes is None else tuple(suffixes), tuple(exclude))
        self.cache = cache_folder(cache)

    def identity(self) -> dict[str, Any]:
        return {
            "class": "Archives",
            "path": None if self.path is None else str(self.path.absolute()),
            "downloads": [{"url": download.shown, "sha256": download.sha256} for download in self.downloads],
            **self.rules.identity(),
        }

    def units(self) -> Iterator[SourceUnit]:
        found = [] if self.path is None else list(_local_units(self.path, self.rules))
        for download in self.downloads:
            location = fetch(download, self.cache / "archives")
            found.append(archive_unit(download.shown, str(location), self.rules, stamp=download.sha256))
        names = Counter(unit.name for unit in found)
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise UserError(f"Archives: {twice} is named twice; name each archive once")
        yield from sorted(found, key=lambda unit: os.fsencode(unit.name))


def _local_units(path: Path, rules: PathRules) -> "Iterator[ArchiveUnit]":
    if path.is_file():
        yield archive_unit(path.name, str(path.absolute()), rules)
        return
    try:
        os.listdir(path)
    except OSError as error:
        raise UserError(f"Archives: {path}: {error.strerror}; give an archive or a folder of archives") from error
    empty = True
    for found in walk(str(path.absolute()), PathRules(exclude=())):
        if found.reason == "unreadable":
            raise UserError(f"Archives: {found.location}: cannot be read; mend it, or give another folder")
        if found.status is not None and _ENDINGS.search(found.path):
            empty = False
            yield archive_unit(found.path, found.location, rules)
    if empty:
        raise UserError(f"Archives: {path}: no archive found; give files that end in .tar.gz, .tar.xz, .zip, .whl, ...")


@dataclass(frozen=True)
class ArchiveUnit(SourceUnit):
    """An archive on this machine."""

    name: str
    size: int
    stamp: str
    location: str
    declared: Declaration
    """What its file name, or the list it comes from, says."""
    rules: PathRules

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        survey = _survey(self.location, limits)
        stated, own = survey.declaration, self.declared
        skipped: Counter[str] = Counter()
        yield Repository(
            stated.name or own.name or self.name,
            _read_files(self.location, survey, self.rules, limits, skipped),
            skipped,
            stated.licence or own.licence,
            stated.version or own.version or "",
        )


def archive_unit(name: str, location: str, rules: PathRules, *, stamp: str = "") -> ArchiveUnit:
    """A unit for an archive as it is now. `stamp`: its digest, where that is known."""
    try:
        status = os.stat(location)
    except OSError as error:
        raise UserError(f"Archives: {location}: {reason_of(error)}; give an archive that can be read") from error
    return ArchiveUnit(
        name, status.st_size, stamp or file_stamp(status), location, declared_by_file_name(location), rules
    )


def declared_by_file_name(location: str) -> Declaration:
    """Name and version as far as an archive's file name tells them."""
    stem = _ENDINGS.sub("", os.path.basename(location))
    if location.endswith(".whl"):
        # https://packaging.python.org/en/latest/specifications/binary-distribution-format/
        return Declaration(*stem.split("-")[:2])
    versioned = _VERSIONED.fullmatch(stem)
    return Declaration(versioned["name"], versioned["version"]) if versioned else Declaration(stem)


class _Survey(NamedTuple):
    """What a first pass over an archive tells, which also compares every checksum."""

    folder: str
    """The folder that holds all files, with a slash; empty where there is none."""
    latest: dict[bytes, int]
    """Number of the last member of each path, by a digest of the path: a later member replaces an earlier one."""
    declaration: Declaration


def _survey(location: str, limits: ReadLimits) -> _Survey:
    folders: set[str] = set()
    latest: dict[bytes, int] = {}
    metadata: dict[str, bytes] = {}
    with open_members(location, limits) as members:
        for number, member in enumerate(members):
            if member.kind != "file" or not member.path:
                continue
            latest[_digest(member.path)] = number
            top, slash, _ = member.path.partition("/")
            if len(folders) < 2:
                folders.add(top + slash if slash else "")
            if _may_declare(member):
                try:
                    metadata[member.path] = member.read()
                except OSError:
                    metadata.pop(member.path, None)
    folder = folders.pop() if len(folders) == 1 else ""
    return _Survey(folder, latest, _declaration(metadata, folder))


def _digest(path: str) -> bytes:
    return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()


def _may_declare(member: Member) -> bool:
    parts = (member.path or "").split("/")
    return len(parts) <= 2 and parts[-1] in declarations.NAMES and member.size <= _MAX_METADATA_BYTES


def _declaration(metadata: dict[str, bytes], folder: str) -> Declaration:
    """That of the archive's own root, or of a wheel's .dist-info folder, if there is exactly one."""
    found = [
        read_declaration(os.path.basename(path), content)
        for path, content in sorted(metadata.items())
        if "/" not in path.removeprefix(folder) or path.endswith(".dist-info/METADATA")
    ]
    named = [declaration for declaration in found if declaration.name is not None]
    return named[0] if len(named) == 1 else Declaration()


def _read_files(
    location: str, survey: _Survey, rules: PathRules, limits: ReadLimits, skipped: Counter[str]
) -> Iterator[SourceFile]:
    with open_members(location, limits) as members:
        for number, member in enumerate(members):
            if member.kind == "folder":
                continue
            # Looked at again without the shared folder: what follows it may begin like a root.
            path = member.path and clean_path(member.path.removeprefix(survey.folder))
            if not member.path or not path:
                skipped["outside"] += 1
                continue
            reason = _reason(member, path, rules, limits)
            if reason is None and survey.latest.get(_digest(member.path)) != number:
                reason = "shadowed"
            if reason is not None:
                skipped[reason] += 1
                continue
            # The licences of a wheel lie in its .dist-info folder.
            for_licence = True if rules.excludes_path(path) else rules.purpose(path, skipped)
            if for_licence is None:
                continue
            try:
                content = member.read()
            except OSError:
                skipped["unreadable"] += 1
                continue
            yield SourceFile(path, content, for_licence)


def _reason(member: Member, path: str, rules: PathRules, limits: ReadLimits) -> str | None:
    """Why a member is left out before it is read, or None."""
    if member.kind != "file":
        return member.kind
    if rules.excludes_path(path) and not (_METADATA_FOLDER.match(path) and is_licence_name(path)):
        return "excluded"
    return "oversize" if member.size > limits.max_file_bytes else None
