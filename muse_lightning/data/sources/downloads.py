"""Files fetched once, by address and SHA-256, and kept in a cache folder."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from muse_lightning.data.filesystems import open_file
from muse_lightning.errors import UserError, reason_of, shown_url
from muse_lightning.files import expand_home, sha256_file

_PIECE = 1 << 20
# Of a file's name on Linux.
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class Download:
    """A file to fetch."""

    url: str = field(repr=False)
    """Where it is: anything fsspec opens (https, s3, gs, file)."""
    sha256: str
    """Hexadecimal SHA-256 of the whole file. Another content is refused."""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise UserError(f"download {self.shown}: sha256 {self.sha256!r} found; 64 digits in 0-9a-f expected")

    @property
    def shown(self) -> str:
        """The URL without credentials."""
        return shown_url(self.url)


def cache_folder(chosen: Path | None) -> Path:
    """The folder for what is fetched: the one that was chosen, or this package's in the user's cache folder."""
    if chosen is not None:
        return expand_home(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "muse-lightning"


def fetch(download: Download, cache: Path) -> Path:
    """The file's place in the cache, fetched if it is not there yet.

    Raises:
        UserError: it cannot be fetched, or what came has another digest.
    """
    name = _file_name(download.url)
    target = cache / download.sha256 / name
    partial = target.with_name(f".{uuid.uuid4().hex}.partial")
    digest = hashlib.sha256()
    try:
        if target.exists() and sha256_file(target) == download.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as local:
            for piece in _pieces(download):
                digest.update(piece)
                local.write(piece)
            local.flush()
            os.fsync(local.fileno())
        if digest.hexdigest() != download.sha256:
            raise UserError(
                f"download {download.shown}: SHA-256 {digest.hexdigest()} found, {download.sha256} expected; "
                "check the address, or pin what you have looked at"
            )
        os.replace(partial, target)
    except OSError as error:
        raise UserError(
            f"download {download.shown}: cannot write {target.parent}: {reason_of(error)}; choose another cache"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def _pieces(download: Download) -> Iterator[bytes]:
    try:
        with open_file(download.url) as remote:
            while piece := remote.read(_PIECE):
                yield piece
    except UserError:
        raise
    # fsspec's file systems raise what their libraries do.
    except Exception as error:
        raise UserError(f"download {download.shown}: {reason_of(error)}; check the address and the network") from error


def _file_name(url: str) -> str:
    """The last part of a URL's path, where that can name a file."""
    name = unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]
    is_name = name not in ("", ".", "..") and "\0" not in name and len(os.fsencode(name)) <= _MAX_NAME_BYTES
    return name if is_name else "file"
