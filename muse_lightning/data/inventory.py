"""All packs together, as arrays: a few dozen bytes per file, no Python object per file or document."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from muse_lightning.data.packs import Pack

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Texts:
    """Many texts in one array of bytes."""

    blob: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> str:
        start = int(self.starts[index])
        return os.fsdecode(self.blob[start : start + int(self.lengths[index])].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def take(self, rows: np.ndarray) -> "Texts":
        """Some of the texts."""
        return replace(self, starts=self.starts[rows], lengths=self.lengths[rows])

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """The texts of a list."""
        encoded = [os.fsencode(text) for text in texts]
        lengths = np.array([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(lengths) - lengths, lengths)


@dataclass(frozen=True)
class Inventory:
    """Files and documents. All pieces of one (source, name) are one document.

    Attributes:
        files: Columns of FILE that later steps need, with `pack` (number of the pack), `document` (row of the
            documents), `language` and `licence` (numbers of `languages` and `licences`). In the order in which they
            were read.
        document_source: [documents] Number of the source.
        document_name: [documents] Number of the name in `names`: equal where names are, across sources.
        names: One text per name.
    """

    packs: Sequence[Pack]
    files: Columns
    document_source: np.ndarray
    document_name: np.ndarray
    names: Texts
    languages: Sequence[str]
    licences: Sequence[str]


def load_inventory(packs: Sequence[Pack]) -> Inventory:
    """Read the records of all packs."""
    repositories, blobs, files = [], [], []
    languages: dict[str, int] = {}
    licences: dict[str, int] = {}
    num_repositories = 0
    for number, pack in enumerate(packs):
        records, own = pack.files(), pack.repositories()
        columns: Columns = {name: records[name] for name in ("offset", "size", "path_bytes", "digest")}
        columns["pack"] = np.full(len(records), number, dtype=np.uint32)
        columns["repository"] = records["repository"] + np.uint32(num_repositories)
        columns["language"] = _renumbered(records["language"], pack.languages, languages)
        columns["licence"] = _renumbered(records["licence"], pack.licences, licences)
        files.append(columns)
        repositories.append(own)
        blobs.append(np.frombuffer(pack.names(), np.uint8))
        num_repositories += len(own)
    rows = np.concatenate(repositories)
    lengths = rows["name_bytes"].astype(np.int64)
    ends = np.cumsum(lengths + rows["revision_bytes"])
    names = Texts(np.concatenate(blobs), ends - lengths - rows["revision_bytes"], lengths)
    first, name_of_row = _equal_rows(rows["name_digest"][:, 0], rows["name_digest"][:, 1])
    first_document, document_of_row = _equal_rows(name_of_row, rows["source"])
    merged = {name: np.concatenate([columns.pop(name) for columns in files]) for name in list(files[0])}
    merged["document"] = document_of_row[merged.pop("repository")].astype(np.uint32)
    return Inventory(
        packs,
        merged,
        rows["source"][first_document],
        name_of_row[first_document].astype(np.uint32),
        names.take(first),
        list(languages),
        list(licences),
    )


def revisions(packs: Sequence[Pack], num_sources: int) -> list[dict[str, str]]:
    """Of each source: the revisions of the repositories that have one, by name; several joined by a space."""
    found: list[dict[str, str]] = [{} for _ in range(num_sources)]
    for pack in packs:
        names, position = pack.names(), 0
        for row in pack.repositories():
            middle = position + int(row["name_bytes"])
            end = middle + int(row["revision_bytes"])
            if end > middle:
                of_source = found[int(row["source"])]
                name, revision = os.fsdecode(names[position:middle]), names[middle:end].decode()
                known = of_source.get(name, "").split(" ")
                of_source[name] = " ".join([*filter(None, known), *([] if revision in known else [revision])])
            position = end
    return [dict(sorted(of_source.items())) for of_source in found]


def _renumbered(column: np.ndarray, texts: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    """A pack's numbers of texts as numbers of all packs' texts: of 16 bits as long as these hold them."""
    own = [numbers.setdefault(text, len(numbers)) for text in texts]
    table = np.array(own, dtype=np.uint16 if len(numbers) <= 1 << 16 else np.uint32)
    return table[column] if len(column) else column


def _equal_rows(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each group of equal rows, and the group of every row, int64."""
    order = np.lexsort(columns)
    is_first = np.ones(len(order), dtype=bool)
    if len(order):
        is_first[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.cumsum(is_first) - 1
    return order[is_first], group
