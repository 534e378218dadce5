"""Rows of JSON lines and Parquet files, one after the other, in bounded memory."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

from muse_lightning.data.documents import DamagedSource, ReadLimits
from muse_lightning.data.sources.unpacking import BoundedStream, open_unpacked, ratio_limit
from muse_lightning.errors import UserError

_PIECE = 1 << 20
# JSON may write one byte of text as six ("\u0001"); the rest is for the other columns.
_ESCAPED = 6
_OTHER_COLUMNS = 1 << 20
# Rows of a Parquet file that are decoded at once.
_BATCH_ROWS = 32
# A column's share of one row group, unpacked: what one row can have at most. Writers are advised to make row groups
# of 512 MiB to 1 GiB for all columns together (https://parquet.apache.org/docs/file-format/configurations/).
_MAX_COLUMN_CHUNK = 1 << 30

Row = dict[str, Any]


def json_rows(file: IO[bytes], size: int, limits: ReadLimits) -> Iterator[Row | str]:
    """The objects of a JSON lines file, packed or not; in place of a line that cannot be used, why: `oversize` for one
    that is too long to hold a text of an allowed size (it is not loaded), `malformed` for what is no JSON object.

    Args:
        file: Open for reading.
        size: Its length in bytes, 0 where it is not known.
        limits: Bounds a line, and how much a packed file may unpack to per byte.
    """
    # A table is read as it unpacks, so that its length alone does no harm.
    stream = BoundedStream(open_unpacked(file), ratio_limit(size, limits) if size else sys.maxsize, _PIECE)
    for line in bounded_lines(stream, limits.max_file_bytes * _ESCAPED + _OTHER_COLUMNS):
        if line is None:
            yield "oversize"
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else "malformed"


def bounded_lines(stream: BoundedStream, limit: int) -> Iterator[bytes | None]:
    """Lines without their ends; None for a line longer than `limit` bytes, of which no more is ever in memory."""
    held: list[bytes] = []
    length = 0
    while piece := stream.read(_PIECE):
        *ended, rest = piece.split(b"\n")
        for part in ended:
            yield None if length + len(part) > limit else b"".join((*held, part))
            held, length = [], 0
        length += len(rest)
        held = [] if length > limit else [*held, rest]
    if length:
        yield None if length > limit else b"".join(held)


def parquet_rows(file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    """The rows of a Parquet file, with those of the named columns that it has, or with all.

    Raises:
        DamagedSource: it is no Parquet file, or a column of a row group is too long.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet files need the package pyarrow: pip install 'muse-lightning[tables]'") from error
    try:
        # Page by page: a row group is never in memory as a whole.
        table = parquet.ParquetFile(file, buffer_size=_PIECE, pre_buffer=False, memory_map=False)
        wanted = [name for name in table.schema_arrow.names if columns is None or name in columns]
        for group in range(table.num_row_groups):
            _check_row_group(table.metadata.row_group(group), wanted)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DamagedSource(f"is no readable Parquet file: {' '.join(str(error).split())}") from error


def _check_row_group(group: Any, columns: Sequence[str]) -> None:
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema in columns and column.total_uncompressed_size > _MAX_COLUMN_CHUNK:
            raise DamagedSource(
                f"column {column.path_in_schema!r} has {column.total_uncompressed_size:,} bytes in one row group, "
                f"{_MAX_COLUMN_CHUNK:,} are allowed"
            )
