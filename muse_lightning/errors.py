"""Errors that a user caused, and the exit codes of every command. All packages may import this file."""

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import TypeVar

Cause = TypeVar("Cause", bound=BaseException)

# Of other schemes only a user with a password: abfs://container@account and hf://model@revision are places. With one
# slash a URL is as pathlib leaves it.
USER_IN_URL = re.compile(
    "(?:"
    + "|".join(f"(?<={scheme}:/)|(?<={scheme}://)" for scheme in ("https", "http", "ftp", "ftps", "git", "ssh"))
    + r")[^/\s]*@|(?<=://)[^/\s]*:[^/\s]*@",
    re.IGNORECASE,
)
# Of other schemes only what assigns something: a question mark may also be a pattern, as in s3://bucket/part-?/x=1. A
# quote ends a query only where nothing but punctuation follows. What stands for a query is none.
QUERY_IN_URL = re.compile(
    r"(https?:/+[^\s?#'\"<>]+|(?!file:)\b\w+://[^\s?#'\"<>]+(?=\?[^\s#'\"<>/]*=))"
    r"\?(?!\.\.\.[^\w%&=]*(?:\s|$))((?:[^\s#'\"<>]|['\"](?=[\w%'\"]))*)",
    re.IGNORECASE,
)
# ESPIPE: of mounted buckets without a cache, which append to nothing.
_STORAGE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ESPIPE}
_LONGEST_REASON = 300
_FEW = 12
"""Names that a line may list."""
_LONGEST_START, _LONGEST_END = 1200, 700
_LONGEST_SEARCHED = 20_000
_PLACE = re.compile(r"\S+/\S+")


class ExitCode(IntEnum):
    """Exit codes of `muse`: a contract with schedulers."""

    DONE = 0
    BUG = 1
    USER_ERROR = 2
    DIFFERENT = 3
    RETRY = 75
    NUMERICS = 76
    STORAGE = 77
    INTERRUPTED = 130


class UserError(Exception):
    """A mistake of the user's: reported as one line, without a traceback, with exit code 2.

    The message says what (key, file, argument), the value found, and what would be accepted.
    """


class RetryError(Exception):
    """Nothing is wrong, and the same command can go on later: preempted, or a run folder is in use. Reported as one
    line, exit code 75."""


class NumericsError(Exception):
    """Training computes numbers that are not finite, or not the same twice. Reported as one line, exit code 76."""


class StorageError(Exception):
    """The storage does not take what must be kept: full, read-only or broken. Reported as one line, exit code 77."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error itself, then each that it was raised from or while handling.

    They may form a circle: an error that is raised again while one that it caused is on its way comes to have that as
    its context.
    """
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def find_cause(error: BaseException, kind: type[Cause]) -> Cause | None:
    """The first of the causes of an error, itself included, that is of this kind; None if there is none.

    Lightning tears a trainer down while an error is on its way, and that can fail in turn.
    """
    return next((found for found in causes(error) if isinstance(found, kind)), None)


def is_storage_error(error: BaseException) -> bool:
    """Whether behind an error is storage that is full, read-only or broken."""
    found = find_cause(error, OSError)
    return found is not None and found.errno in _STORAGE_FAULTS


def too_long_path(error: BaseException) -> UserError | None:
    """The user's mistake behind an error, where a path is longer than the system takes; None if that is not the error.

    Almost any look at a path may be the first that fails so: of these errors alone the system's word is enough.
    """
    found = find_cause(error, OSError)
    if found is None or found.errno != errno.ENAMETOOLONG:
        return None
    return UserError(f"{str(found.filename)!r:.300}: {reason_of(found)}; give a shorter path")


def alike(name: str, accepted: Iterable[str], count: int = 3) -> list[str]:
    """The names in `accepted` most like `name`, the most alike first; none where none is."""
    return difflib.get_close_matches(name, sorted(accepted), n=count)


def suggestion(name: str, accepted: Iterable[str]) -> str:
    """The end of an error message about an unknown name: those in `accepted` that are most like it; where none is, all
    if they are few, else nothing."""
    accepted = sorted(accepted)
    if close := alike(name, accepted):
        return f"; nearest: {', '.join(close)}"
    return f"; accepted: {', '.join(accepted)}" if 0 < len(accepted) <= _FEW else ""


def shown_url(text: str) -> str:
    """A URL, or a text with URLs in it, as it may be printed and stored: without users and passwords, and with `?...`
    in place of a query, which may be a signature. Equal for a URL that is signed anew."""
    return QUERY_IN_URL.sub(r"\1?...", USER_IN_URL.sub("", text))


def one_line(text: str) -> str:
    """A message as it is printed: one line without credentials. Of a long one, which quotes what may be as long as a
    command line or a file, the middle is left out."""
    line = " ".join(text.split())
    if len(line) > _LONGEST_SEARCHED:
        # The patterns take time with the square of what is full of beginnings of URLs.
        line = f"{line[: _LONGEST_SEARCHED // 2]} ... {line[-_LONGEST_SEARCHED // 2 :]}"
    line = shown_url(line)
    if len(line) <= _LONGEST_START + _LONGEST_END:
        return line
    return f"{line[:_LONGEST_START]} ... {line[-_LONGEST_END:]}"


def reason_of(error: BaseException) -> str:
    """What an error of a library or of the system says, in one line of bounded length without credentials. Of one that
    says no more than where it happened, what it was raised from, or its kind."""
    said = error.strerror if isinstance(error, OSError) and error.errno and error.strerror else str(error)
    reason = " ".join(shown_url(str(said)).split())[:_LONGEST_REASON]
    if reason and not _PLACE.fullmatch(reason):
        return reason
    if error.__cause__ is not None:
        return reason_of(error.__cause__)
    return "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
