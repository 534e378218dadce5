"""Rows of JSON lines and Parquet files, one after the other, in bounded memory."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from muse_lightning.data.documents import DamagedSource, ReadLimits
from muse_lightning.data.sources import parquet_reader
from muse_lightning.data.sources.unpacking import BoundedStream, open_unpacked, ratio_limit
from muse_lightning.errors import UserError, shown_url

_PIECE = 1 << 20
# JSON may write one byte of text as six ("\u0001"); the rest is for the other columns.
_ESCAPED = 6
_OTHER_COLUMNS = 1 << 20

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


@contextmanager
def open_parquet_rows(name: str, columns: Sequence[str] | None, limits: ReadLimits) -> Iterator[Iterator[Row | str]]:
    """The rows of a Parquet file, with those of the named columns that it has, or with all; as `json_rows` gives them.

    A process of its own reads the file: a damaged one can make the library abort, and would take the preparation along.

    Args:
        name: What fsspec opens.
        columns: Names of columns; None for all.
        limits: Bounds a row.
    Raises:
        DamagedSource: it is no Parquet file, or its reader died of it.
        UserError: it cannot be read, whatever is in it.
    """
    # -P: without it, Python would look for modules in the working directory first. Not -m, which warns that the module
    # is known already.
    start = f"import {parquet_reader.__name__} as reader; reader.main()"
    command = [sys.executable, "-P", "-W", "ignore", "-c", start]
    with tempfile.TemporaryFile() as task, tempfile.TemporaryFile() as messages:
        # Not as arguments, which every user of the machine may see: the name may have credentials in it.
        task.write(json.dumps([name, columns]).encode())
        task.seek(0)
        with subprocess.Popen(command, stdin=task, stdout=subprocess.PIPE, stderr=messages) as reader:
            assert reader.stdout is not None
            ended = False
            try:
                yield json_rows(reader.stdout, 0, limits)
                ended = not reader.stdout.read(1)
            finally:
                if not ended:
                    reader.kill()
        if ended and reader.returncode != 0:
            messages.seek(0)
            text = shown_url(" ".join(messages.read(1 << 16).decode(errors="replace").split()))
            if reader.returncode in (parquet_reader.NOT_INSTALLED, parquet_reader.UNREADABLE):
                raise UserError(text)
            if reader.returncode in (-signal.SIGKILL, -signal.SIGTERM):
                raise UserError(
                    f"{shown_url(name)}: its reader was killed, most likely for lack of memory; use fewer "
                    "data.prepare_workers"
                )
            raise DamagedSource(
                text if reader.returncode == parquet_reader.DAMAGED else f"its reader died: {text[-300:]}"
            )
