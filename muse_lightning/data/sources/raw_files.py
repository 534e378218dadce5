"""Files as they come from a disk or over a network. What goes wrong there is told apart from damage in what was read:
it says nothing about the file, so that a preparation stops and can go on later."""

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from muse_lightning.data.documents import DamagedSource
from muse_lightning.data.filesystems import open_file
from muse_lightning.errors import UserError, reason_of, shown_url

_PIECE = 1 << 16


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors of opening or reading a file as one line.

    Raises:
        DamagedSource: there is no such file any more.
        UserError: anything else. File systems of fsspec raise errors of their own libraries.
    """
    try:
        yield
    except (UserError, DamagedSource):
        raise
    except FileNotFoundError as error:
        raise DamagedSource("is gone since it was listed") from error
    except Exception as error:
        raise cannot_read(name, error) from error


def cannot_read(name: str, error: BaseException) -> UserError:
    """The error to raise where a disk, the network or this machine fails."""
    return UserError(
        f"{shown_url(name)}: cannot be read: {reason_of(error)}; it is not taken for damaged: check the disk, the "
        "network and your credentials, and prepare again: what was finished is kept"
    )


class _Raw(io.RawIOBase):
    """A file whose errors of reading are named. A seek reads nothing: what it refuses is the fault of the file's own
    numbers."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # any writable buffer, a type of Python 3.12
        with reading(self._name):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except ValueError as error:
            if whence == io.SEEK_SET and offset < 0:
                raise
            # A server that gives a file only from its beginning.
            raise cannot_read(self._name, error) from error

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def open_raw(name: str, *, is_local: bool = False) -> Iterator[io.BufferedReader]:
    """A file that is open for reading.

    Args:
        name: What fsspec opens.
        is_local: The name is a path, whatever it looks like.
    Raises:
        DamagedSource, UserError: see `reading`; while it is read, too.
    """
    with ExitStack() as stack:
        with reading(name):
            opened = open(name, "rb", buffering=0) if is_local else open_file(name)  # noqa: SIM115
            file = stack.enter_context(opened)
        yield io.BufferedReader(_Raw(file, name), _PIECE)
