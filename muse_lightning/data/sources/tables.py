"""Tables of texts: JSON lines and Parquet, local or remote."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, NamedTuple

from muse_lightning.data.documents import DamagedSource, DocumentSource, ReadLimits, Repository, SourceFile, SourceUnit
from muse_lightning.data.filesystems import filesystem
from muse_lightning.data.sources.local import clean_path, file_stamp
from muse_lightning.data.sources.raw_files import open_raw
from muse_lightning.data.sources.table_rows import Row, json_rows, open_parquet_rows
from muse_lightning.data.sources.unpacking import damage_named
from muse_lightning.errors import UserError, reason_of, shown_url, suggestion

_PARQUET = ".parquet"
_JSON = (".jsonl", ".json", ".ndjson")
_PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
# Size, times, checksums and versions, as the file systems of fsspec call them.
_STAMP_KEYS = (
    *("size", "mtime", "created", "modified", "last_modified", "LastModified", "Last-Modified", "updated"),
    *("ETag", "etag", "md5", "md5Hash", "crc32c", "Content-MD5", "content_md5", "checksum", "Digest"),
    *("blob_id", "lfs", "xet_hash", "sha", "oid", "VersionId", "version_id", "generation", "modificationTime"),
)
_ENDINGS = (*(ending + packed for ending in _JSON for packed in _PACKED), _PARQUET)


# Rows that are looked at for the names of columns: JSON lines may leave out what is null.
_LOOKED_AT = 32


class Columns(NamedTuple):
    """Which column holds what; None where none does."""

    text: str
    group: str
    path: str | None
    licence: str | None
    extension: str

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return [name for name in self[:4] if name is not None]


class Tables(DocumentSource):
    """Texts in the rows of JSON lines (.jsonl, also .gz, .bz2, .xz, .zst) and Parquet files.

    Rows of one group are one document. Files are read as a stream: rows of a group that do not follow each other, or
    are in several files, become one document all the same.
    """

    def __init__(
        self,
        files: list[str],
        text: str = "text",
        group: str = "repo_name",
        path: str | None = None,
        licence: str | None = None,
        extension: str = ".txt",
    ) -> None:
        """
        Args:
            files: Paths or URLs, through fsspec (s3://bucket/x.parquet, gs://, hf://datasets/owner/name/x.parquet); *
                matches many.
            text: Column with the text of one file.
            group: Column whose value rows of one document share; it is the document's name.
            path: Column with the file's path in the document. null: the row's number, with `extension`.
            licence: Column with an SPDX expression, or a list of one. null: none is declared.
            extension: Ending of paths that are made of row numbers. It decides what language the text is taken for.
        """
        if not files:
            raise UserError("Tables: files is empty; give paths or URLs of .jsonl or .parquet files")
        self.files = list(files)
        self.columns = Columns(text, group, path, licence, extension)

    def identity(self) -> dict[str, Any]:
        return {"class": "Tables", "files": [shown_url(file) for file in self.files], **self.columns._asdict()}

    def units(self) -> Iterator[SourceUnit]:
        found: dict[str, TableUnit] = {}
        for unit in (unit for pattern in self.files for unit in self._matching(pattern)):
            if found.setdefault(unit.name, unit).location != unit.location:
                raise UserError(f"Tables: {unit.name} stands for several URLs; give files that differ in their paths")
        units = [found[name] for name in sorted(found, key=os.fsencode)]
        # A name that is misspelt here would otherwise show as a dataset without a text.
        units[0].check_columns()
        yield from units

    def _matching(self, pattern: str) -> "Iterator[TableUnit]":
        try:
            system, path = filesystem(os.path.expanduser(pattern))
            names = sorted(system.glob(path)) if "*" in shown_url(path) else [path]
            for name in names:
                if not _without_query(name).endswith(_ENDINGS):
                    raise UserError(
                        f"Tables: {shown_url(name)}: names that end in .jsonl, .jsonl.gz, .jsonl.zst, .parquet expected"
                    )
                info = system.info(name)
                if info["type"] != "file":
                    raise UserError(
                        f"Tables: {shown_url(name)} is no file; give files, or a pattern such as "
                        f"{shown_url(name)}/*.parquet"
                    )
                local = "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))
                stamp = file_stamp(os.stat(name)) if local else _remote_stamp(info)
                location = system.unstrip_protocol(name)
                is_parquet = _without_query(name).endswith(_PARQUET)
                yield TableUnit(shown_url(location), info.get("size") or 0, stamp, self.columns, is_parquet, location)
        except UserError:
            raise
        # Every file system of fsspec raises errors of its own library.
        except Exception as error:
            raise UserError(
                f"Tables: {shown_url(pattern)}: {reason_of(error)}; check the path, the network and your credentials"
            ) from error
        if not names:
            raise UserError(
                f"Tables: {shown_url(pattern)}: no file found; give paths or URLs of .jsonl or .parquet files"
            )


def _without_query(url: str) -> str:
    """A URL, or a path, up to a query."""
    return shown_url(url).removesuffix("?...")


def _remote_stamp(info: dict[str, Any]) -> str:
    """Of what a file system tells of a file that changes with it, not with the request: no date, no signature."""
    told = sorted((key, str(info[key])) for key in _STAMP_KEYS if info.get(key) is not None)
    return hashlib.sha256(repr(told).encode()).hexdigest()


class _Text(NamedTuple):
    """One row that can be used."""

    group: str
    licence: str | None
    path: str
    content: bytes


@dataclass(frozen=True)
class TableUnit(SourceUnit):
    """One file of rows."""

    name: str
    size: int
    stamp: str
    columns: Columns
    is_parquet: bool
    location: str = field(repr=False)
    """What fsspec opens; the name is the same without credentials."""

    def read(self, limits: ReadLimits) -> Iterator[Repository]:
        # Counts what is left out while the current group is read; before the first group, for the first.
        skipped = [Counter[str]()]
        found = False
        for (group, licence), texts in groupby(self._texts(limits, skipped), key=lambda text: text[:2]):
            if found:
                skipped[0] = Counter()
            found = True
            yield Repository(group, (SourceFile(t.path, t.content) for t in texts), skipped[0], licence)
        if not found:
            yield Repository(self.name, (), skipped[0])

    def check_columns(self) -> None:
        """Compare the configured columns with those of the first rows.

        Raises:
            UserError: one is not there.
        """
        try:
            with self._open_rows(ReadLimits(), all_columns=True) as rows:
                found = {name for row in islice(rows, _LOOKED_AT) if not isinstance(row, str) for name in row}
        except DamagedSource:
            # Named when it is read.
            return
        missing = next((name for name in self.columns.names if name not in found), None)
        if found and missing is not None:
            raise UserError(f"Tables: {self.name}: no column {missing!r}{suggestion(missing, found)}")

    @contextmanager
    def _open_rows(self, limits: ReadLimits, all_columns: bool = False) -> Iterator[Iterator[Row | str]]:
        with damage_named(self.name), ExitStack() as stack:
            if self.is_parquet:
                columns = None if all_columns else self.columns.names
                yield stack.enter_context(open_parquet_rows(self.location, columns, limits))
            else:
                yield json_rows(stack.enter_context(open_raw(self.location)), self.size, limits)

    def _texts(self, limits: ReadLimits, skipped: list[Counter[str]]) -> Iterator[_Text]:
        """The rows that can be used. `skipped[0]`, whichever counter that is by then, counts the others."""
        with self._open_rows(limits) as rows:
            for number, row in enumerate(rows):
                text = row if isinstance(row, str) else self._text_of(row, number, limits)
                if isinstance(text, str):
                    skipped[0][text] += 1
                else:
                    yield text

    def _text_of(self, row: Row, number: int, limits: ReadLimits) -> _Text | str:
        """A row's text, or why it cannot be used."""
        columns = self.columns
        text, group = row.get(columns.text), row.get(columns.group)
        if not isinstance(text, str) or not isinstance(group, str | int) or group == "":
            return "malformed"
        # Half of a surrogate pair can be written in JSON; the filters count it as what is not UTF-8.
        content = text.encode("utf-8", "surrogatepass")
        if len(content) > limits.max_file_bytes:
            return "oversize"
        path = row.get(columns.path) if columns.path else None
        path = clean_path(path) if isinstance(path, str) and path else f"{number:09d}{columns.extension}"
        if not path:
            return "outside"
        licence = row.get(columns.licence) if columns.licence else None
        if isinstance(licence, list):
            licence = licence[0] if len(licence) == 1 else None
        return _Text(str(group), licence if isinstance(licence, str) and licence else None, path, content)
