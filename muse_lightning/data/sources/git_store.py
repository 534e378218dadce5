"""A git repository's references and the tree of one commit, read without its configuration and without running git.

A repository's own configuration (which may name programs, or files to include), its hooks and its work tree are never
opened.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dulwich.objects import ObjectID
from dulwich.objectspec import parse_commit, parse_object
from dulwich.refs import DictRefsContainer, Ref
from dulwich.repo import BaseRepo

from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.sources.git_objects import GitObjects
from muse_lightning.data.sources.git_packs import BLOB, COMMIT, TREE, BrokenObjectError, broken_named
from muse_lightning.data.sources.local import PathRules, clean_path, read_regular
from muse_lightning.errors import reason_of

_MAX_REFERENCE_BYTES = 1 << 12
_MAX_PACKED_REFERENCES_BYTES = 1 << 28
# Commits and trees; the largest trees in use have some 100,000 entries of 50 bytes.
_MAX_TREE_BYTES = 32 << 20
_ID_BYTES = 20
_MOST_NAMES = 8
# In front of what one writes, in git's order.
_PREFIXES = (b"", b"refs/", b"refs/tags/", b"refs/heads/", b"refs/remotes/")
_FOLDER = 0o040000
# Why an entry of a commit is no file. Files have mode 100644, 100755 or, in old repositories, 100664.
NO_FILE = {0o120000: "symlink", 0o160000: "submodule"}


class TreeEntry(NamedTuple):
    """One name in a folder of a commit."""

    path: str
    mode: int
    id: bytes
    """40 digits."""


def git_folder(location: str) -> str | None:
    """The folder that holds a repository's objects and references: `location/.git`, or `location` itself where it is
    bare; None where it is no repository.

    Raises:
        DamagedSource: .git is a file that names another place, as in a work tree or a submodule.
    """
    inside = os.path.join(location, ".git")
    if os.path.isfile(inside) or os.path.islink(inside):
        raise DamagedSource(".git is no folder; give the repository that the work tree belongs to")
    for folder in (inside, location):
        if os.path.isdir(os.path.join(folder, "objects")) and os.path.isfile(os.path.join(folder, "HEAD")):
            return folder
    return None


def is_repository(location: str) -> bool:
    """Whether a folder (no link) looks like a repository, as far as that can be told without reading it."""
    if os.path.islink(location):
        return False
    return os.path.lexists(os.path.join(location, ".git")) or os.path.isdir(os.path.join(location, "objects"))


def resolve_commit(folder: str, revision: str) -> str:
    """The full id of the commit that a revision names: a branch, a tag, an id or its beginning, HEAD~3, HEAD^2.

    Raises:
        DamagedSource: there is no such commit, or a needed object is missing.
    """
    objects = GitObjects(folder, _MAX_TREE_BYTES)
    references = DictRefsContainer(_references(folder))  # type: ignore[arg-type]
    try:
        repository = BaseRepo(objects, references)  # type: ignore[arg-type]
        with broken_named("it"):
            # The one knows short ids, the other ~ and ^.
            if "~" in revision or "^" in revision:
                return parse_commit(repository, parse_object(repository, revision).id).id.decode()  # type: ignore[arg-type]
            return parse_commit(repository, revision).id.decode()
    except BrokenObjectError as error:
        try:
            with broken_named("it"):
                why = _why_not(objects, references, revision, error)
        except BrokenObjectError as another:
            why = reason_of(another)
        raise DamagedSource(f"no commit {revision!r}: {_printable(why)}") from error
    finally:
        objects.close()


def _why_not(objects: GitObjects, references: DictRefsContainer, revision: str, error: BrokenObjectError) -> str:
    """What keeps a revision from being a commit: a broken object, a commit without such a parent, or that nothing has
    that name; then the names that there are.

    Raises:
        BrokenObjectError: it is an object that is missing or damaged.
    """
    if not isinstance(error.__cause__, KeyError):
        return reason_of(error.__cause__ or error)
    name = os.fsencode(re.split("[~^]", revision)[0])
    asked = error.__cause__.args[0]
    if asked != name and re.fullmatch(b"[0-9a-f]{40}", asked):
        objects.read(asked, _MAX_TREE_BYTES)
    for prefix in _PREFIXES:
        _, found = references.follow(prefix + name)  # type: ignore[arg-type]
        if found is not None:
            objects.read(found, _MAX_TREE_BYTES)
            raise error
    return _described(references.as_dict())


def _described(references: Mapping[Ref, ObjectID]) -> str:
    """The branches and tags as one writes them, those of another repository's HEAD left out."""
    full = sorted(name for name in references if name.startswith((b"refs/heads/", b"refs/tags/", b"refs/remotes/")))
    names = [
        os.fsdecode(name).split("/", 2)[2]
        for name in full
        if not (name.startswith(b"refs/remotes/") and name.endswith(b"/HEAD"))
    ]
    if not names:
        return "it has no branches and no tags; a repository without commits has nothing to read"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"it has the branches and tags {', '.join(names[:_MOST_NAMES])}{more}"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _references(folder: str) -> dict[bytes, bytes]:
    """Every reference by its full name. What is no regular file (a link, a pipe) or too long is as good as absent."""
    found: dict[bytes, bytes] = {}
    for line in _read(folder, "packed-refs", _MAX_PACKED_REFERENCES_BYTES).splitlines():
        name = line[41:]
        if line[40:41] == b" " and name.startswith(b"refs/"):
            found[name] = line[:40]
    paths = ["HEAD"]
    for root, _, names in os.walk(os.path.join(folder, "refs")):
        paths += [os.path.relpath(os.path.join(root, name), folder) for name in names]
    for path in paths:
        content = _read(folder, path, _MAX_REFERENCE_BYTES).strip()
        if content:
            found[os.fsencode(path)] = content
    return found


def _read(folder: str, path: str, limit: int) -> bytes:
    try:
        return read_regular(os.path.join(folder, path), limit) or b""
    except OSError:
        return b""


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
            DamagedSource: the commit is missing or broken.
        """
        self._objects = GitObjects(folder, _MAX_TREE_BYTES)
        header = self._needed(commit.encode(), COMMIT).split(b"\n", 1)[0]
        self._tree = header.removeprefix(b"tree ")
        if len(self._tree) != 2 * _ID_BYTES or not self._tree.isalnum():
            raise DamagedSource("its commit names no tree")

    def close(self) -> None:
        """Close the packs."""
        self._objects.close()

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
                raise DamagedSource(f"has more than {limit:,} entries")
            for child in reversed(below):
                if child.mode == _FOLDER and rules.excludes(child.path.rpartition("/")[2]):
                    skipped["excluded"] += 1
                else:
                    pending.append(child)

    def content(self, entry: TreeEntry, limit: int) -> bytes | str:
        """A file's bytes; or why it is left out: `oversize` for more than `limit` bytes, which are not unpacked, and
        `unreadable` where its object is missing, broken or no file."""
        try:
            kind, size = self._objects.look(entry.id)
            if kind != BLOB:
                return "unreadable"
            return "oversize" if size > limit else self._objects.read(entry.id, limit)[1]
        except BrokenObjectError:
            return "unreadable"

    def _list(self, folder: TreeEntry, skipped: Counter[str]) -> list[TreeEntry]:
        """The entries of a tree object, each path once; names that git would not check out are counted."""
        data = self._needed(folder.id, TREE)
        found: dict[str, TreeEntry] = {}
        position = 0
        while position < len(data):
            end = data.find(b"\0", position)
            mode, space, name = data[position:end].partition(b" ")
            if end < 0 or not space or not mode.isdigit() or b"8" in mode or b"9" in mode:
                raise DamagedSource(f"tree {folder.id.decode()} is broken")
            if end + 1 + _ID_BYTES > len(data):
                raise DamagedSource(f"tree {folder.id.decode()} ends too early")
            position = end + 1 + _ID_BYTES
            path = (f"{folder.path}/" if folder.path else "") + os.fsdecode(name)
            if b"/" in name or clean_path(path) != path or not name:
                skipped["outside"] += 1
            elif path in found:
                skipped["shadowed"] += 1
            else:
                found[path] = TreeEntry(path, int(mode, 8), data[end + 1 : position].hex().encode())
        return sorted(found.values(), key=lambda e: os.fsencode(e.path) + (b"/" if e.mode == _FOLDER else b""))

    def _needed(self, name: bytes, wanted: int) -> bytes:
        try:
            kind, content = self._objects.read(name, _MAX_TREE_BYTES)
        except BrokenObjectError as error:
            raise DamagedSource(f"object {name.decode()} is missing or broken ({error})") from error
        if kind != wanted:
            raise DamagedSource(f"object {name.decode()} is of another kind than it has to be")
        return content
