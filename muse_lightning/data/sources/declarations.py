"""What a package says of itself in a metadata file: its name, version and licence. Nothing is executed."""

import json
import re
from email.parser import BytesHeaderParser
from email.policy import compat32
from typing import NamedTuple

from muse_lightning.data.licences import declared_licence

# Python's core metadata (https://packaging.python.org/en/latest/specifications/core-metadata/) and npm's.
NAMES = ("PKG-INFO", "METADATA", "package.json")
_NAME = re.compile(r"(?:@[a-z0-9~._-]+/)?[A-Za-z0-9][A-Za-z0-9._-]{0,213}")


class Declaration(NamedTuple):
    """What a package says; None for what it does not."""

    name: str | None = None
    version: str | None = None
    licence: str | None = None
    """SPDX expression."""


def read_declaration(file_name: str, content: bytes) -> Declaration:
    """What one of the files called `NAMES` says. A file that is not what its name promises says nothing."""
    if file_name == "package.json":
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            return Declaration()
        if not isinstance(fields, dict):
            return Declaration()
        name, version = fields.get("name"), fields.get("version")
    else:
        headers = BytesHeaderParser(policy=compat32).parsebytes(content)
        name, version = headers.get("Name"), headers.get("Version")
    return Declaration(
        name if isinstance(name, str) and _NAME.fullmatch(name) else None,
        version if isinstance(version, str) and 0 < len(version) < 100 else None,
        declared_licence(file_name, content),
    )
