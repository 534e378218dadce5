"""Git repositories, local or at a URL, at any revision, read from their object stores."""

import glob
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muse_lightning.data.documents import DamagedSource, DocumentSource, ReadLimits, Repository, SourceFile, SourceUnit
from muse_lightning.data.sources.downloads import cache_folder
from muse_lightning.data.sources.git_clones import clone, is_git_url
from muse_lightning.data.sources.git_store import (
    NO_FILE,
    CommitReader,
    TreeEntry,
    git_folder,
    is_repository,
    objects_size,
    resolve_commit,
)
from muse_lightning.data.sources.local import EXCLUDE, PathRules
from muse_lightning.errors import UserError, shown_url


class GitRepositories(DocumentSource):
    """One document per git repository, as it is at a commit; the work tree, if any, is not looked at.

    Names: `owner/name` of a URL, a local repository's folder without `.git`.
    """

    def __init__(
        self,
        repositories: list[str],
        revision: str = "HEAD",
        suffixes: tuple[str, ...] | None = None,
        exclude: tuple[str, ...] = EXCLUDE,
        cache: Path | None = None,
        refresh: bool = False,
    ) -> None:
        """
        Args:
            repositories: Paths (with a work tree or bare; * and ? match many) and URLs of repositories. A revision may
                follow after #: https://example.com/owner/name#v1.2.
            revision: What is read where no revision follows: a branch, a tag, a commit.
            suffixes: Endings of the file names to take, for example [.py, .md]. null takes every file that passes the
                filters.
            exclude: Patterns of folder names to leave out at any depth.
            cache: Folder that keeps clones of URLs. null: muse-lightning in the user's cache folder.
            refresh: Whether to ask for branches and tags of URLs again. Otherwise a clone is used as it is.
        """
        if not repositories:
            raise UserError("GitRepositories: repositories is empty; give paths or URLs")
        self.repositories = list(repositories)
        self.revision = revision
        self.rules = PathRules(None if suffixes is None else tuple(suffixes), tuple(exclude))
        self.cache = cache_folder(cache)
        self.refresh = refresh

    def identity(self) -> dict[str, Any]:
        return {
            "class": "GitRepositories",
            "repositories": [shown_url(repository) for repository in self.repositories],
            "revision": self.revision,
            **self.rules.identity(),
        }

    def units(self) -> Iterator[SourceUnit]:
        found: dict[str, GitUnit] = {}
        for entry in self.repositories:
            for unit in self._units_of(entry):
                if unit.name in found:
                    raise UserError(f"GitRepositories: {unit.name} is named twice; name each repository once")
                found[unit.name] = unit
        yield from sorted(found.values(), key=lambda unit: os.fsencode(unit.name))

    def _units_of(self, entry: str) -> "Iterator[GitUnit]":
        location, mark, revision = entry.rpartition("#")
        in_host = "://" in location and "/" not in location.partition("://")[2]
        if not mark or in_host or (not is_git_url(entry) and os.path.exists(os.path.expanduser(entry))):
            location, revision = entry, self.revision
        if is_git_url(location):
            shown = shown_url(location)
            owner_and_name = shown.rstrip("/").removesuffix(".git").replace(":", "/").split("/")[-2:]
            path = clone(location, revision, self.cache / "git", self.refresh)
            # Where the clone has the one commit that was asked for, HEAD is it.
            at = "HEAD" if (path / "refs" / "heads" / "wanted").exists() else revision
            try:
                yield self._unit(f"{shown}#{revision}", "/".join(owner_and_name), str(path), at, must_exist=True)
            except UserError:
                # So that the server is asked again next time.
                shutil.rmtree(path, ignore_errors=True)
                raise
            return
        pattern = os.path.expanduser(location)
        is_one = os.path.lexists(pattern)
        paths = [pattern] if is_one else [path for path in glob.glob(pattern) if is_repository(path)]
        if not paths:
            raise UserError(f"GitRepositories: {location}: no git repository; give a repository's path or its URL")
        for path_text in paths:
            absolute = os.path.abspath(path_text)
            name = os.path.basename(absolute).removesuffix(".git")
            yield self._unit(f"{absolute}#{revision}", name, absolute, revision, must_exist=is_one)

    def _unit(self, name: str, repository: str, location: str, revision: str, must_exist: bool) -> "GitUnit":
        """A unit; one that names what is wrong when it is read where a repository among many is broken."""
        try:
            folder = git_folder(location)
            if folder is None:
                raise DamagedSource("is no git repository")
            commit = resolve_commit(folder, revision)
        except DamagedSource as error:
            if must_exist:
                shown = name.rpartition("#")[0]
                raise UserError(
                    f"GitRepositories: {shown}: {error}; give a repository and a revision that it has"
                ) from error
            return GitUnit(name, 0, str(error), location, "", repository, self.rules)
        return GitUnit(name, objects_size(folder), commit, folder, commit, repository, self.rules)


@dataclass(frozen=True)
class GitUnit(SourceUnit):
    """A repository at a commit."""

    name: str
    size: int
    stamp: str
    folder: str
    """Where objects and references lie."""
    commit: str
    """Full id; empty where the repository could not be opened, and `stamp` says why."""
    repository: str
    rules: PathRules

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        if not self.commit:
            raise DamagedSource(self.stamp)
        skipped: Counter[str] = Counter()
        with closing(CommitReader(self.folder, self.commit)) as reader:
            yield Repository(self.repository, self._files(reader, limits, skipped), skipped, revision=self.commit)

    def _files(self, reader: CommitReader, limits: ReadLimits, skipped: Counter[str]) -> Iterator[SourceFile]:
        left = limits.max_unpacked_bytes
        for entry in reader.entries(self.rules, limits.max_members, skipped):
            for_licence = self._purpose(entry, skipped)
            if for_licence is None:
                continue
            content = reader.content(entry, limits.max_file_bytes)
            if isinstance(content, str):
                skipped[content] += 1
                continue
            left -= len(content)
            if left < 0:
                raise DamagedSource(f"has more than {limits.max_unpacked_bytes:,} bytes")
            yield SourceFile(entry.path, content, for_licence)

    def _purpose(self, entry: TreeEntry, skipped: Counter[str]) -> bool | None:
        if entry.mode in NO_FILE:
            skipped[NO_FILE[entry.mode]] += 1
            return None
        return self.rules.purpose(entry.path, skipped)
