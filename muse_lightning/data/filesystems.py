"""fsspec's file systems. s3:// and gs:// go through obstore, which litdata brings along (s3fs pins an older botocore
than boto3 needs), hf:// through huggingface_hub, which tokenizers brings along."""

from typing import Any

import fsspec
import obstore.fsspec

from muse_lightning.errors import UserError, reason_of, shown_url

obstore.fsspec.register(["s3", "gs"])


def is_url(place: str) -> bool:
    """Whether a place is a URL, and not a path on this machine."""
    return "://" in place


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path within it.

    Raises:
        UserError: there is no such file system.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{shown_url(url)}: {reason_of(error)}; accepted: s3://, gs://, hf://, https://, file://, and others that "
            "fsspec has"
        ) from error


def open_file(url: str) -> Any:
    """A file, to be opened for reading by a `with` statement: a path or a URL."""
    return fsspec.open(url, "rb")
