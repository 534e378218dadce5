"""Folders on this machine, shared by the sources that read one. Symbolic links and special files are never followed."""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

from muse_lightning.data.documents import DamagedSource, ReadLimits, Repository, SourceFile, SourceUnit, name_bytes
from muse_lightning.data.licences import is_licence_name

# Version control, environments, caches and what packaging tools add: nothing that people wrote.
EXCLUDE = (".*", "__pycache__", "node_modules", "*.egg-info", "*.dist-info")
# Length of a path on Linux.
_MAX_PATH_BYTES = 4096


@dataclass(frozen=True)
class PathRules:
    """Which paths of a repository a source takes."""

    suffixes: tuple[str, ...] | None = None
    """Endings of the file names to take, for example `.py`; None takes all."""
    exclude: tuple[str, ...] = EXCLUDE
    """Patterns (`*`, `?`) of folder names to leave out at any depth."""

    def excludes(self, folder_name: str) -> bool:
        """Whether a folder's own name (no path) matches one of the patterns."""
        return any(fnmatchcase(folder_name, pattern) for pattern in self.exclude)

    def excludes_path(self, path: str) -> bool:
        """Whether any folder on the way to a file is left out."""
        return _is_excluded_folder(path.rpartition("/")[0], self)

    def takes(self, path: str) -> bool:
        """Whether a file's name has one of the wanted endings."""
        return self.suffixes is None or path.endswith(self.suffixes)

    def purpose(self, path: str, skipped: Counter[str]) -> bool | None:
        """What a file is read for: False for its text, True for the licence it may hold, None for nothing (counted)."""
        if self.takes(path):
            return False
        if is_licence_name(path):
            return True
        skipped["suffix"] += 1
        return None

    def describe(self) -> str:
        """What is looked for, for messages."""
        return "files" if self.suffixes is None else f"files that end in {', '.join(self.suffixes)}"

    def identity(self) -> dict[str, list[str] | None]:
        """The same as plain JSON values."""
        return {"suffixes": None if self.suffixes is None else list(self.suffixes), "exclude": list(self.exclude)}


@lru_cache(maxsize=1024)
def _is_excluded_folder(path: str, rules: PathRules) -> bool:
    return any(rules.excludes(name) for name in path.split("/"))


def clean_path(name: str) -> str | None:
    """A path inside an archive, a table or a git tree, with "." and double slashes removed; None where it leaves the
    inside, or is longer than a path can be. Backslashes separate, too."""
    parts = re.split(r"[/\\]", name)
    drive = len(parts[0]) == 2 and parts[0][1] == ":"
    if name[:1] in ("/", "\\") or drive or ".." in parts or "\0" in name or len(name_bytes(name)) > _MAX_PATH_BYTES:
        return None
    return "/".join(part for part in name.split("/") if part not in ("", "."))


class Found(NamedTuple):
    """One entry of a folder tree."""

    path: str
    """Below the root, with forward slashes."""
    location: str
    """Where it lies on this machine."""
    status: os.stat_result | None
    """None for what is left out."""
    reason: str
    """Why it is left out; empty for a regular file."""


def walk(root: str, rules: PathRules, *, recursive: bool = True) -> Iterator[Found]:
    """Everything below a folder, in the order of the paths' bytes, one folder in memory at a time.

    Args:
        root: The folder. It may itself be reached through a symbolic link; nothing below it is followed.
        rules: Which folders are left out. Suffixes are not looked at.
        recursive: False stays in the folder itself.
    """
    # Folders still to be listed, last first.
    pending: list[Found] = [Found("", root, None, "")]
    while pending:
        found = pending.pop()
        if found.reason or found.status is not None:
            yield found
            continue
        try:
            with os.scandir(found.location) as entries:
                listed = list(entries)
        except OSError:
            yield found._replace(reason="unreadable")
            continue
        below = [_classify(entry, found.path, rules) for entry in listed]
        if not recursive:
            below = [entry for entry in below if entry.reason or entry.status is not None]
        # A folder sorts as its name with a slash, so that the whole is in the order of the full paths.
        below.sort(
            key=lambda entry: os.fsencode(entry.path) + (b"" if entry.reason or entry.status else b"/"), reverse=True
        )
        pending.extend(below)


def _classify(entry: os.DirEntry[str], folder: str, rules: PathRules) -> Found:
    """A folder has neither status nor reason."""
    path = f"{folder}/{entry.name}" if folder else entry.name
    try:
        if entry.is_symlink():
            return Found(path, entry.path, None, "symlink")
        if entry.is_dir(follow_symlinks=False):
            return Found(path, entry.path, None, "excluded" if rules.excludes(entry.name) else "")
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return Found(path, entry.path, None, "unreadable")
    if stat.S_ISREG(status.st_mode):
        return Found(path, entry.path, status, "")
    return Found(path, entry.path, None, "special")


def file_stamp(status: os.stat_result) -> str:
    """Size and the times of modification and of status change, as in git's index: the second time also catches an
    edit whose size and modification time were restored."""
    return f"{status.st_size},{status.st_mtime_ns},{status.st_ctime_ns}"


def read_regular(location: str, limit: int) -> bytes | None:
    """A file's content, or None where it is longer than `limit`.

    Raises:
        OSError: it cannot be read, or is no regular file: one that became a link or a pipe since it was listed is an
            error, not a way out of the folder.
    """
    descriptor = os.open(location, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{location} is no regular file")
        if status.st_size > limit:
            return None
        content = file.read(limit + 1)
        return None if content is not None and len(content) > limit else content


def read_or_none(location: str, limits: ReadLimits) -> bytes | None:
    """A file's content, or None where it cannot be read or is too long."""
    try:
        return read_regular(location, limits.max_file_bytes)
    except OSError:
        return None


def read_found(
    found: Iterator[Found], rules: PathRules, limits: ReadLimits, skipped: Counter[str]
) -> Iterator[SourceFile]:
    """The files that a walk finds, one in memory at a time; everything left out is counted."""
    for entry in found:
        if entry.reason:
            skipped[entry.reason] += 1
            continue
        for_licence = rules.purpose(entry.path, skipped)
        if for_licence is None:
            continue
        try:
            content = read_regular(entry.location, limits.max_file_bytes)
        except OSError:
            skipped["unreadable"] += 1
            continue
        if content is None:
            skipped["oversize"] += 1
        else:
            yield SourceFile(entry.path, content, for_licence)


@dataclass(frozen=True)
class FolderUnit(SourceUnit):
    """A folder that is one repository."""

    name: str
    size: int
    stamp: str
    root: str
    repository: str
    """The repository's name."""
    rules: PathRules
    files: int
    """Regular files with a wanted ending, when it was listed."""
    entries: int
    """Entries of every kind."""
    recursive: bool = True

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        if not os.path.isdir(self.root):
            raise DamagedSource("is gone since it was listed")
        skipped: Counter[str] = Counter()
        found = walk(self.root, self.rules, recursive=self.recursive)
        yield Repository(self.repository, read_found(found, self.rules, limits, skipped), skipped)


def folder_unit(name: str, repository: str, root: str, rules: PathRules, *, recursive: bool = True) -> FolderUnit:
    """A unit for a folder as it is now. Its stamp is a digest over every name, size and time below it."""
    root = os.path.abspath(root)
    size = files = entries = 0
    digest = hashlib.sha256()
    for entry in walk(root, rules, recursive=recursive):
        # NUL cannot occur in a path, so that no two trees run together into the same bytes.
        digest.update(b"\0" + os.fsencode(entry.path) + b"\0" + entry.reason.encode())
        entries += 1
        if entry.status is not None:
            size, files = size + entry.status.st_size, files + rules.takes(entry.path)
            digest.update(file_stamp(entry.status).encode())
    return FolderUnit(name, size, digest.hexdigest(), root, repository, rules, files, entries, recursive)
