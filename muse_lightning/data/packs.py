"""First stage: units are read, their files filtered, and what is kept goes to a pack: a file of bytes, and records of
what lies where."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from muse_lightning.data.documents import DamagedSource, ReadLimits, Repository, SourceUnit, name_bytes
from muse_lightning.data.filters import Filters
from muse_lightning.data.jobs import Job, Meter
from muse_lightning.data.left_out import LeftOut
from muse_lightning.data.licences import LicenceFinder
from muse_lightning.files import sha256_bytes

FILE = np.dtype(
    [
        ("offset", "<u8"),  # where path and content begin, one after the other
        ("size", "<u8"),  # of the content
        ("path_bytes", "<u4"),
        ("repository", "<u4"),  # row of the pack's repositories
        ("language", "<u2"),  # index of the pack's languages
        ("licence", "<u2"),
        ("digest", "<u8", 2),  # of the content
    ]
)
REPOSITORY = np.dtype(
    [
        ("source", "<u2"),
        ("name_bytes", "<u4"),  # name and revision lie in `names`, one after the other
        ("revision_bytes", "<u4"),
        ("name_digest", "<u8", 2),
        ("size", "<u8"),  # of the files kept
    ]
)
UNKNOWN = "unknown"
_LEFT_OUT = "left_out.jsonl"
_NAMES = ("content.bin", "files.bin", "repositories.bin", "names.bin", _LEFT_OUT)

_MAX_UNITS = 512
_MOST_NUMBERS = 2**16 - 1  # and one more for what is unknown
# Their releases may see another language or licence in the same file.
_LIBRARIES = ("identify", "license-expression")
_FILES_BETWEEN_COUNTS = 64
# Part of every pack's key: raise it when the same units would give another pack.
_PACK_VERSION = 3


@dataclass(frozen=True)
class ReadJob(Job):
    """Units to read into one pack."""

    units: tuple[tuple[int, SourceUnit], ...]
    """Each with the number of its source."""
    filters: Filters
    limits: ReadLimits
    key: str
    size: int

    def run(self, folder: Path, context: Any, meter: Meter) -> dict[str, Any]:
        with ExitStack() as stack:
            files = [stack.enter_context(open(folder / name, "wb", buffering=1 << 20)) for name in _NAMES]
            writer = _PackWriter(files, self.filters, meter)
            for source, unit in self.units:
                writer.read_unit(source, unit, self.limits)
        return writer.summary()


def read_jobs(
    units: Sequence[tuple[int, SourceUnit]],
    identities: Sequence[dict[str, Any]],
    filters: Filters,
    limits: ReadLimits,
    pack_bytes: int,
) -> Iterator[ReadJob]:
    """Group units, in the given order, into packs of about `pack_bytes`."""
    group: list[tuple[int, SourceUnit]] = []
    size = 0
    versions = [version(library) for library in _LIBRARIES]
    common = json.dumps([_PACK_VERSION, versions, identities, asdict(filters), asdict(limits)], sort_keys=True)
    for index, (source, unit) in enumerate(units):
        group.append((source, unit))
        size += unit.size
        if size >= pack_bytes or len(group) == _MAX_UNITS or index == len(units) - 1:
            stamps = json.dumps([[number, one.name, one.stamp] for number, one in group])
            yield ReadJob(tuple(group), filters, limits, sha256_bytes((common + stamps).encode())[:32], size)
            group, size = [], 0


class _Numbers:
    """Texts, numbered in the order of their first use, as far as 16 bits go; what comes later is unknown."""

    def __init__(self) -> None:
        self._number_of: dict[str, int] = {}

    def __call__(self, text: str | None) -> int:
        text = text or UNKNOWN
        if text not in self._number_of and len(self._number_of) >= _MOST_NUMBERS:
            text = UNKNOWN
        return self._number_of.setdefault(text, len(self._number_of))

    def texts(self) -> list[str]:
        return list(self._number_of)


class _PackWriter:
    """Appends what passes the filters to a pack. Memory holds one repository's records at a time."""

    def __init__(self, files: Sequence[IO[bytes]], filters: Filters, meter: Meter) -> None:
        self._content, self._files, self._repositories, self._names, self._left_out = self._all = files
        self._filters = filters
        self._meter = meter
        self._languages, self._licences = _Numbers(), _Numbers()
        self._position = self._num_repositories = self._num_files = self._uncounted = 0
        self._skipped: Counter[str] = Counter()
        self._damaged: list[tuple[int, str, str]] = []

    def read_unit(self, source: int, unit: SourceUnit, limits: ReadLimits) -> None:
        """Append a unit; of one that turns out to be damaged nothing stays."""
        before = self._position, self._num_repositories, self._num_files
        ends = [file.tell() for file in self._all]
        skipped: Counter[str] = Counter()
        try:
            for repository in unit.read(limits):
                self._read_repository(source, repository, skipped)
        except DamagedSource as error:
            self._position, self._num_repositories, self._num_files = before
            for file, end in zip(self._all, ends, strict=True):
                file.seek(end)
                file.truncate()
            self._damaged.append((source, unit.name, " ".join(str(error).split())))
        else:
            self._skipped.update(skipped)
        self._meter(unit.size, self._uncounted, 0)
        self._uncounted = 0

    def _read_repository(self, source: int, repository: Repository, skipped: Counter[str]) -> None:
        finder = LicenceFinder(repository.licence)
        rows, paths = [], []
        for file in repository.files:
            finder.add(file.path, file.content)
            self._uncounted += 1
            if self._uncounted == _FILES_BETWEEN_COUNTS:
                self._meter(0, self._uncounted, 0)
                self._uncounted = 0
            if file.for_licence:
                skipped["suffix"] += 1
                continue
            verdict = self._filters.check(file.path, file.content)
            if verdict.reason is not None:
                skipped[verdict.reason] += 1
                self._left_out.write(LeftOut(verdict.reason, repository.name, file.path).to_line())
                continue
            path = name_bytes(file.path)
            digest = hashlib.blake2b(file.content, digest_size=16).digest()
            language = self._languages(verdict.language)
            self._content.write(path)
            self._content.write(file.content)
            size = len(file.content)
            rows.append(
                (self._position, size, len(path), self._num_repositories, language, 0, np.frombuffer(digest, "<u8"))
            )
            paths.append(file.path)
            self._position += len(path) + size
        skipped.update(repository.skipped)
        files = np.array(rows, dtype=FILE)
        kept = np.ones(len(files), dtype=bool)
        # A licence file may come after the files it is about.
        for index, path_text in enumerate(paths):
            licence = finder.licence_of(path_text)
            reason = self._filters.check_licence(licence)
            if reason is None:
                files["licence"][index] = self._licences(licence)
            else:
                kept[index] = False
                skipped[reason] += 1
                self._left_out.write(LeftOut(reason, repository.name, path_text).to_line())
        files = files[kept]
        name, revision = name_bytes(repository.name), name_bytes(repository.revision)
        digest = hashlib.blake2b(name, digest_size=16).digest()
        row = (source, len(name), len(revision), np.frombuffer(digest, "<u8"), files["size"].sum())
        self._files.write(files.tobytes())
        self._repositories.write(np.array([row], dtype=REPOSITORY).tobytes())
        self._names.write(name + revision)
        self._num_files += len(files)
        self._num_repositories += 1

    def summary(self) -> dict[str, Any]:
        """What is in the pack."""
        return {
            "files": self._num_files,
            "languages": self._languages.texts(),
            "licences": self._licences.texts(),
            "skipped": dict(self._skipped),
            "damaged": self._damaged,
        }


@dataclass(frozen=True)
class Pack:
    """A pack that is on the disk."""

    folder: Path
    languages: list[str]
    licences: list[str]

    @property
    def content(self) -> Path:
        """Path and content of every file."""
        return self.folder / "content.bin"

    @property
    def left_out(self) -> Path:
        """The list of the files that the filters left out."""
        return self.folder / _LEFT_OUT

    def files(self) -> np.ndarray:
        """[files] of FILE."""
        return np.fromfile(self.folder / "files.bin", dtype=FILE)

    def repositories(self) -> np.ndarray:
        """[repositories] of REPOSITORY."""
        return np.fromfile(self.folder / "repositories.bin", dtype=REPOSITORY)

    def names(self) -> bytes:
        """Name and revision of every repository, one after the other."""
        return (self.folder / "names.bin").read_bytes()
