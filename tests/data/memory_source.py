"""A source whose units are held in memory, for tests of what comes behind the sources."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muse_lightning.data.documents import (
    DamagedSource,
    DocumentSource,
    ReadLimits,
    Repository,
    SourceFile,
    SourceUnit,
)


@dataclass(frozen=True)
class MemoryUnit(SourceUnit):
    """Repositories of the given files, in the given order."""

    name: str
    repositories: tuple[tuple[str, dict[str, bytes]], ...]
    stamp: str = "1"
    licence: str | None = None
    revision: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)
    damaged: str = ""
    """If set, the unit turns out to be damaged, for that reason, after all of its files."""
    for_licence: tuple[str, ...] = ()
    """Paths that are given for licences only."""

    @property
    def size(self) -> int:  # known from the content
        return sum(len(content) for _, files in self.repositories for content in files.values())

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        for name, files in self.repositories:
            skipped: Counter[str] = Counter()
            yield Repository(name, self._files(files, skipped), skipped, self.licence, self.revision)

    def _files(self, files: dict[str, bytes], skipped: Counter[str]) -> Iterator[SourceFile]:
        for path, content in files.items():
            yield SourceFile(path, content, path in self.for_licence)
        skipped.update(self.skipped)
        if self.damaged:
            raise DamagedSource(self.damaged)


class MemorySource(DocumentSource):
    """The given units; or a unit for each of the given repositories."""

    def __init__(self, units: list[MemoryUnit] | Mapping[str, dict[str, bytes]], name: str = "memory") -> None:
        self.name = name
        self._units = (
            [MemoryUnit(repository, ((repository, files),)) for repository, files in units.items()]
            if isinstance(units, Mapping)
            else units
        )

    def identity(self) -> dict[str, Any]:
        return {"class": "MemorySource", "name": self.name}

    def units(self) -> Iterator[SourceUnit]:
        return iter(sorted(self._units, key=lambda unit: unit.name))


def text(number: int, size: int) -> bytes:
    """`size` bytes of lines that no other number gives."""
    line = f"value_{number} = {number}\n".encode()
    return (line * (size // len(line) + 1))[: size - 1] + b"\n"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
