"""What a source gives: documents (repositories) made of files, listed without reading a byte of their content."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class SourceFile(ABC):
    """One file of a repository, by name until it is read."""

    path: str
    """Path inside the repository with forward slashes. Bytes that are not UTF-8 are kept as `os.fsdecode` does
    (surrogates)."""
    size: int
    """Length in bytes when it was listed."""
    stamp: str
    """A text that changes whenever the content may have changed."""

    @abstractmethod
    def read(self) -> bytes:
        """The whole content. Raises OSError when the file cannot be read."""


@dataclass(frozen=True)
class Document:
    """One repository, or one part of a huge one: the unit of splitting, shuffling and document masks."""

    name: str
    """Name of the repository, as the model sees it. All documents of one name land in the same split."""
    files: tuple[SourceFile, ...]
    part: str = ""
    """Where a cut repository goes on: the path of the part's first file. Empty for a whole repository."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of files left out while listing, by reason."""

    @property
    def size(self) -> int:
        """Bytes of all files, as listed."""
        return sum(file.size for file in self.files)


class DocumentSource(ABC):
    """Lists documents. A recipe names a class of this kind by `class_path`; its constructor arguments are its fields.

    Contract: listing is deterministic (equal files give equal documents in equal order), reads no file, executes and
    imports nothing of what it lists, and follows no symbolic link. Documents can be pickled.
    """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this source from another one, as plain JSON values: its class and every argument its result
        depends on."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, sorted by name.

        Raises:
            UserError: the place that the source describes is missing, empty or unreadable.
        """


def listing_digest(documents: list[Document]) -> str:
    """Hexadecimal SHA-256 over name, path, size and stamp of every file: equal exactly when nothing that was listed
    changed."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(b"\0document\0" + os.fsencode(document.name))
        for file in document.files:
            # NUL cannot occur in a path, so that no two listings run together into the same bytes.
            digest.update(b"\0" + os.fsencode(file.path) + f"\0{file.size}\0{file.stamp}".encode())
    return digest.hexdigest()


def cut_by_folder(document: Document, max_bytes: int) -> list[Document]:
    """Cut a repository into documents of at most `max_bytes` listed bytes, keeping folders together where they fit.

    Sub-folders that are too large are cut in turn; neighbours in path order are put together as long as they fit. A
    single larger file stays a document of its own. Every part keeps the repository's name and the full paths.
    """
    if document.size <= max_bytes:
        return [document]
    files = sorted(document.files, key=lambda file: os.fsencode(file.path).split(b"/"))
    parts: list[list[SourceFile]] = []
    current: list[SourceFile] = []
    # Groups still to be placed, last first: (files, depth of the path component at which to cut them).
    pending = [(files, 0)]
    while pending:
        group, depth = pending.pop()
        size = sum(file.size for file in group)
        if size > max_bytes and len(group) > 1:
            pending.extend((child, depth + 1) for child in reversed(_children(group, depth)))
            continue
        if current and sum(file.size for file in current) + size > max_bytes:
            parts.append(current)
            current = []
        current = current + group
    if current:
        parts.append(current)
    return [
        replace(document, files=tuple(part), part=part[0].path, skipped=document.skipped if index == 0 else {})
        for index, part in enumerate(parts)
    ]


def _children(files: list[SourceFile], depth: int) -> list[list[SourceFile]]:
    """Files grouped by the sub-folder they lie in at `depth`; a file directly in the folder is a group of its own."""
    groups: list[list[SourceFile]] = []
    last_folder: str | None = None
    for file in files:
        components = file.path.split("/")
        folder = components[depth] if len(components) > depth + 1 else None
        if folder is not None and folder == last_folder:
            groups[-1].append(file)
        else:
            groups.append([file])
        last_folder = folder
    return groups
