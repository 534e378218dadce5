"""What a source gives: units that one process reads at a time, each with repositories made of files."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from muse_lightning.errors import UserError


class DamagedSource(ValueError):  # noqa: N818
    """A unit that cannot be read as a whole: a corrupt archive, missing git objects. The text is one line, and does
    not name the unit: who reports it does.

    Raised by `SourceUnit.read`, or while the files of one of its repositories are consumed. What the unit gave before
    is then dropped, the unit is counted and named, and the preparation goes on.
    """


@dataclass(frozen=True)
class ArchiveLimits:
    """What one archive may unpack to, against decompression bombs; one that exceeds them is a damaged unit."""

    max_members: int = 1_000_000
    """Members of any kind."""
    max_unpacked_bytes: int = 16 << 30
    """Bytes of all members together."""
    max_ratio: int = 200
    """Unpacked bytes per byte of the archive. deflate reaches 1032 at most (zlib.net/zlib_tech.html); source text
    rarely more than 10."""

    def __post_init__(self) -> None:
        for name in ("max_members", "max_unpacked_bytes", "max_ratio"):
            if getattr(self, name) < 1:
                raise UserError(f"archive_limits.{name}: {getattr(self, name)} found, at least 1 expected")


DEFAULT_ARCHIVE_LIMITS = ArchiveLimits()


@dataclass(frozen=True)
class ReadLimits(ArchiveLimits):
    """What a source may take into memory or unpack."""

    max_file_bytes: int = 1_000_000
    """Longer files are counted (`oversize`) without being read into memory."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a repository."""

    path: str
    """Inside the repository, with forward slashes. Bytes that are not UTF-8 as `os.fsdecode` gives them
    (surrogates)."""
    content: bytes
    for_licence: bool = False
    """Whether the file is given only so that the repository's licences can be found: counted as `suffix`, never
    kept."""


@dataclass
class Repository:
    """A document to be, as a source reads it."""

    name: str
    """As the model sees it. All documents of one name, from any unit and any source, land in the same split."""
    files: Iterable[SourceFile]
    """Consumed once, in a deterministic order, one in memory at a time."""
    skipped: Counter[str] = field(default_factory=Counter)
    """While the files are consumed, the source counts here by reason what it leaves out."""
    licence: str | None = None
    """SPDX expression, where the source declares one."""
    revision: str = ""
    """Commit or version, where there is one."""


def name_bytes(name: str) -> bytes:
    """A name or path as bytes: those it was made of by `os.fsdecode`, with `?` for characters that no bytes stand for
    (half a surrogate pair, as JSON can spell it)."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace")


class SourceUnit(ABC):
    """What one process reads at a time: a folder, an archive, a git repository at a commit, a table file.

    Contract: it can be pickled; reading is deterministic, executes and imports nothing of what it reads, and never
    leaves the place it describes (no symbolic link is followed).
    """

    name: str
    """Unique in its source. Decides the order; shown in messages."""
    size: int
    """Bytes, about: for progress and to share out the work."""
    stamp: str
    """Changes whenever the content may have changed."""

    @abstractmethod
    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        """The repositories of this unit. The files of one are consumed before the next is asked for.

        Raises:
            DamagedSource: the unit cannot be read.
        """


class DocumentSource(ABC):
    """A place that documents come from. A recipe names a class of this kind by `class_path`; its constructor arguments
    are its fields."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this source from another one, as plain JSON values: its class and every argument its result
        depends on."""

    @abstractmethod
    def units(self) -> Iterator[SourceUnit]:
        """All units, sorted by the bytes of their names. Cheap: nothing is read that a stamp does not need.

        Raises:
            UserError: the place that the source describes is missing, empty or unreadable.
        """
