"""Listing of folders on this machine, shared by the sources that read one. Symbolic links and special files are
never followed."""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from muse_lightning.data.documents import Document, SourceFile


@dataclass(frozen=True)
class LocalFile(SourceFile):
    """A regular file below a folder."""

    location: str
    """Absolute path on this machine."""

    def read(self) -> bytes:
        # O_NOFOLLOW: a file that became a link since it was listed is an error, not a way out of the folder.
        with open(os.open(self.location, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            return file.read()


def local_file(path: str, location: str, status: os.stat_result) -> LocalFile:
    """A listed file. Its stamp is its times of modification and of status change, as in git's index: the second one
    also catches an edit whose size and modification time were restored."""
    return LocalFile(path, status.st_size, f"{status.st_mtime_ns},{status.st_ctime_ns}", location)


def list_folder(
    name: str, root: str, *, suffixes: Sequence[str] | None, exclude: Sequence[str], recursive: bool = True
) -> Document:
    """The regular files below `root` as one document, sorted by path.

    Args:
        name: The document's name.
        root: The folder. It may itself be reached through a symbolic link; nothing below it is followed.
        suffixes: Endings of the file names to take, for example `.py`; None takes all.
        exclude: Patterns (`*`, `?`) of folder names to leave out at any depth.
        recursive: False takes only the files that lie directly in `root`.
    Returns:
        The document. `skipped` counts the files left out by suffix, the symbolic links, the special files and what
        could not be listed.
    """
    files: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    endings = None if suffixes is None else tuple(suffixes)
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError:
            skipped["unreadable"] += 1
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                skipped["symlink"] += 1
            elif entry.is_dir(follow_symlinks=False):
                if recursive and not is_excluded(entry.name, exclude):
                    pending.append(path)
            elif endings is not None and not entry.name.endswith(endings):
                skipped["suffix"] += 1
            else:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    skipped["unreadable"] += 1
                    continue
                if stat.S_ISREG(status.st_mode):
                    files.append(local_file(path, os.path.abspath(entry.path), status))
                else:
                    skipped["special"] += 1
    files.sort(key=lambda file: os.fsencode(file.path))
    return Document(name, tuple(files), skipped=dict(skipped))


def is_excluded(folder_name: str, patterns: Sequence[str]) -> bool:
    """Whether a folder's own name (no path) matches one of the patterns."""
    return any(fnmatchcase(folder_name, pattern) for pattern in patterns)
