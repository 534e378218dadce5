"""A git repository's objects and references, read without its configuration and without running git.

libgit2 reads the object store alone. A repository's own configuration (which may name programs, or files to include),
its hooks, its work tree and its alternates (stores elsewhere) are never opened.
"""

import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.sources.local import PathRules

try:
    import pygit2
    from pygit2.enums import ObjectType, RepositoryOpenFlag
except ImportError:
    HAS_PYGIT2 = False
else:
    HAS_PYGIT2 = True

_MAX_REFERENCE_BYTES = 1 << 12
_MAX_PACKED_REFERENCES_BYTES = 1 << 28
_CONFIG = "[core]\n\trepositoryformatversion = 0\n\tbare = true\n"

# Commits and trees; the largest trees in use have some 100,000 entries of 50 bytes.
_MAX_TREE_BYTES = 64 << 20
_MAX_PATH = 4096
_ID_BYTES = 20
_FOLDER = 0o040000
# Why an entry of a commit is no file. Files have mode 100644, 100755 or, in old repositories, 100664.
NO_FILE = {0o120000: "symlink", 0o160000: "submodule"}


class TreeEntry(NamedTuple):
    """One name in a folder of a commit."""

    path: str
    mode: int
    id: "pygit2.Oid"


def git_folder(location: str) -> str | None:
    """The folder that holds a repository's objects and references: `location/.git`, or `location` itself where it is
    bare; None where it is no repository.

    Raises:
        DamagedSource: .git is a file that names another place, as in a work tree or a submodule.
    """
    inside = os.path.join(location, ".git")
    if os.path.isfile(inside) or os.path.islink(inside):
        raise DamagedSource(f"{location}: .git is no folder; give the repository that the work tree belongs to")
    for folder in (inside, location):
        if os.path.isdir(os.path.join(folder, "objects")) and os.path.isfile(os.path.join(folder, "HEAD")):
            return folder
    return None


def resolve_commit(folder: str, revision: str) -> str:
    """The full id of the commit that a revision names, as git reads revisions (a branch, a tag, an id, HEAD~3).

    Raises:
        DamagedSource: there is no such commit, or a needed object is missing.
    """
    # libgit2 resolves revisions for repositories only; this one has the real objects and references, nothing else.
    with tempfile.TemporaryDirectory(prefix="muse-git-") as bare:
        try:
            _copy_references(folder, bare)
            repository = pygit2.Repository(bare, RepositoryOpenFlag.NO_SEARCH)
            repository.set_odb(open_objects(folder))
            return str(repository.revparse_single(revision).peel(pygit2.Commit).id)
        except (pygit2.GitError, KeyError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DamagedSource(f"{folder}: no commit {revision!r} ({reason})") from error


def _copy_references(folder: str, bare: str) -> None:
    with open(os.path.join(bare, "config"), "x") as file:
        file.write(_CONFIG)
    os.mkdir(os.path.join(bare, "objects"))
    os.mkdir(os.path.join(bare, "refs"))
    _copy_regular(folder, bare, "HEAD", _MAX_REFERENCE_BYTES)
    _copy_regular(folder, bare, "packed-refs", _MAX_PACKED_REFERENCES_BYTES)
    for root, _, names in os.walk(os.path.join(folder, "refs")):
        below = os.path.relpath(root, folder)
        os.makedirs(os.path.join(bare, below), exist_ok=True)
        for name in names:
            _copy_regular(folder, bare, os.path.join(below, name), _MAX_REFERENCE_BYTES)


def _copy_regular(folder: str, bare: str, name: str, limit: int) -> None:
    """Copy a reference file; what is no regular file (a link, a pipe) or too long is as good as absent."""
    try:
        status = os.lstat(os.path.join(folder, name))
    except OSError:
        return
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        shutil.copyfile(os.path.join(folder, name), os.path.join(bare, name), follow_symlinks=False)


def open_objects(folder: str) -> "pygit2.Odb":
    """The object store, after a look that it lies where it says.

    Raises:
        DamagedSource: it borrows objects from elsewhere, or has a link in it.
    """
    objects = os.path.join(folder, "objects")
    if os.path.lexists(os.path.join(objects, "info", "alternates")):
        raise DamagedSource(f"{folder} borrows objects of another repository; run `git repack -a -d` in it first")
    for place in (objects, os.path.join(objects, "pack"), os.path.join(objects, "info")):
        links = [place] if os.path.islink(place) else []
        if not links and os.path.isdir(place):
            with os.scandir(place) as entries:
                links = [entry.path for entry in entries if entry.is_symlink()]
        if links:
            raise DamagedSource(f"{links[0]} is a link; objects are read from the repository's own folder only")
    return pygit2.Odb(objects)


def objects_size(folder: str) -> int:
    """Bytes of the object store on disk."""
    return sum(
        os.lstat(os.path.join(root, name)).st_size
        for root, _, names in os.walk(os.path.join(folder, "objects"))
        for name in names
    )


class CommitReader:
    """The files of one commit: names first, contents on demand."""

    def __init__(self, folder: str, commit: str) -> None:
        """
        Args:
            folder: What `git_folder` returned.
            commit: Full id.
        Raises:
            DamagedSource: the commit or its tree is missing.
        """
        self._objects = open_objects(folder)
        self._place = f"{folder}, commit {commit}"
        header = self._read(pygit2.Oid(hex=commit), ObjectType.COMMIT).split(b"\n", 1)[0]
        try:
            self._tree = pygit2.Oid(hex=header.removeprefix(b"tree ").decode("ascii"))
        except ValueError as error:
            raise DamagedSource(f"{self._place}: names no tree") from error

    def entries(self, rules: PathRules, limit: int, skipped: Counter[str]) -> Iterator[TreeEntry]:
        """The commit's files, links and submodules, in the order of the paths' bytes.

        Args:
            rules: Folders to leave out (counted once each).
            limit: Entries of any kind that the tree may have.
            skipped: Counts what is left out.
        Raises:
            DamagedSource: a tree is missing or broken, or there are too many entries: a few kilobytes can name one
                folder billions of times.
        """
        # Trees still to be listed and entries still to be given, last first.
        pending = [TreeEntry("", _FOLDER, self._tree)]
        seen = 0
        while pending:
            entry = pending.pop()
            if entry.mode != _FOLDER:
                yield entry
                continue
            below = self._list(entry, skipped)
            seen += len(below)
            if seen > limit:
                raise DamagedSource(f"{self._place}: more than {limit:,} entries")
            for child in reversed(below):
                if child.mode == _FOLDER and rules.excludes(child.path.rpartition("/")[2]):
                    skipped["excluded"] += 1
                else:
                    pending.append(child)

    def size(self, entry: TreeEntry) -> int | None:
        """Bytes of a file, or None where its object is missing or no file."""
        try:
            kind, size = self._objects.read_header(entry.id)
        except (pygit2.GitError, KeyError, ValueError, OSError):
            return None
        return size if kind == ObjectType.BLOB else None

    def content(self, entry: TreeEntry) -> bytes | None:
        """A file's bytes, or None where its object is missing or broken."""
        try:
            return self._objects.read(entry.id)[1]
        except (pygit2.GitError, KeyError, ValueError, OSError):
            return None

    def _list(self, folder: TreeEntry, skipped: Counter[str]) -> list[TreeEntry]:
        """The entries of a tree object, each path once; names that git would not check out are counted."""
        data = self._read(folder.id, ObjectType.TREE)
        found: dict[str, TreeEntry] = {}
        position = 0
        while position < len(data):
            end = data.find(b"\0", position)
            mode, space, name = data[position:end].partition(b" ")
            if end < 0 or not space or not mode.isdigit() or end + 1 + _ID_BYTES > len(data):
                raise DamagedSource(f"{self._place}: tree {folder.id} is broken")
            position = end + 1 + _ID_BYTES
            path = (f"{folder.path}/" if folder.path else "") + os.fsdecode(name)
            if name in (b"", b".", b"..") or b"/" in name or len(path) > _MAX_PATH:
                skipped["outside"] += 1
            elif path in found:
                skipped["shadowed"] += 1
            else:
                found[path] = TreeEntry(path, int(mode, 8), pygit2.Oid(raw=data[end + 1 : position]))
        return sorted(found.values(), key=lambda e: os.fsencode(e.path) + (b"/" if e.mode == _FOLDER else b""))

    def _read(self, oid: "pygit2.Oid", wanted: "ObjectType") -> bytes:
        try:
            kind, size = self._objects.read_header(oid)
            if kind == wanted and size <= _MAX_TREE_BYTES:
                return self._objects.read(oid)[1]
        except (pygit2.GitError, KeyError, ValueError, OSError) as error:
            raise DamagedSource(f"{self._place}: object {oid} is missing or broken") from error
        raise DamagedSource(f"{self._place}: object {oid} is no {wanted.name.lower()} of a possible size")
