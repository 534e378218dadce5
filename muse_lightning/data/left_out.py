"""Which files a dataset was made without, each with the reason: `left_out.jsonl.gz` beside the card."""

import gzip
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from muse_lightning.errors import UserError, reason_of

LEFT_OUT_NAME = "left_out.jsonl.gz"
_LEVEL = 6


class LeftOut(NamedTuple):
    """One file that is not in a dataset."""

    reason: str
    """As counted in the card."""
    repository: str
    path: str

    def to_line(self) -> bytes:
        """A line of the list: a JSON array, in which what is no UTF-8 is escaped."""
        return json.dumps(self).encode() + b"\n"


def write_left_out(dataset: Path, lists: Sequence[Path], more: Iterable[LeftOut]) -> None:
    """Join the lists of all packs, and some more files, to the list of a dataset. Equal input gives equal bytes."""
    with (
        open(dataset / LEFT_OUT_NAME, "wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=file, mtime=0) as target,
    ):
        for path in lists:
            with open(path, "rb") as source:
                shutil.copyfileobj(source, target)
        for entry in more:
            target.write(entry.to_line())


def read_left_out(dataset: Path) -> Iterator[LeftOut]:
    """The files that a dataset was made without, in the order in which they were read, duplicates last.

    Raises:
        UserError: the dataset has no such list, or it is damaged.
    """
    path = dataset / LEFT_OUT_NAME
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                yield _parse(line)
    except FileNotFoundError as error:
        raise UserError(
            f"{dataset} has no {LEFT_OUT_NAME}: it was prepared by an earlier version; prepare it in another folder"
        ) from error
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}); prepare the dataset again") from error


def _parse(line: bytes) -> LeftOut:
    entry = json.loads(line)
    if not isinstance(entry, list) or len(entry) != 3 or not all(isinstance(field, str) for field in entry):
        raise ValueError("a line is no list of three strings")
    return LeftOut(*entry)
