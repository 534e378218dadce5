"""A Parquet file as JSON lines on standard output, for a process of its own.

On standard input is a JSON list: a name that fsspec opens, and a list of columns or null for all. Values that JSON does
not have become null.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.sources.raw_files import open_raw
from muse_lightning.errors import UserError, reason_of

DAMAGED, NOT_INSTALLED, UNREADABLE = 3, 4, 5

_PIECE = 1 << 20
# Rows that are decoded at once.
_BATCH_ROWS = 32
# A column's share of one row group, unpacked: what one row can have at most. Writers are advised to make row groups
# of 512 MiB to 1 GiB for all columns together (https://parquet.apache.org/docs/file-format/configurations/).
_MAX_COLUMN_CHUNK = 1 << 30


def main() -> NoReturn:
    """Do what standard input asks for, and end with the exit code of `write_rows`."""
    # A file that was not opened complains when it is thrown away, and would join the line that is said.
    sys.unraisablehook = lambda unraisable: None
    code = write_rows(*json.load(sys.stdin))
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: what a library does on its way out, which may be to crash, says nothing about the file.
    os._exit(code)


def write_rows(name: str, columns: Sequence[str] | None) -> int:
    """Write the rows; the exit code, with a line on standard error where it is not 0."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        print("Parquet files need the package pyarrow: pip install 'muse-lightning[tables]'", file=sys.stderr)
        return NOT_INSTALLED
    try:
        with open_raw(name) as file:
            # Page by page: a row group is never in memory as a whole.
            table = parquet.ParquetFile(file, buffer_size=_PIECE, pre_buffer=False, memory_map=False)
            wanted = [column for column in table.schema_arrow.names if columns is None or column in columns]
            for group in range(table.num_row_groups):
                _check_row_group(table.metadata.row_group(group), wanted)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    print(json.dumps(row, default=lambda value: None))
    except UserError as error:
        print(error, file=sys.stderr)
        return UNREADABLE
    except DamagedSource as error:
        print(error, file=sys.stderr)
        return DAMAGED
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        print(f"is no readable Parquet file: {reason_of(error)}", file=sys.stderr)
        return DAMAGED
    return 0


def _check_row_group(group: Any, columns: Sequence[str]) -> None:
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema in columns and column.total_uncompressed_size > _MAX_COLUMN_CHUNK:
            raise ValueError(
                f"column {column.path_in_schema!r} has {column.total_uncompressed_size:,} bytes in one row group, "
                f"{_MAX_COLUMN_CHUNK:,} are allowed"
            )
