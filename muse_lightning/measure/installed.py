"""What is installed, and which code of ours: names, versions and hashes, to tell whether two runs had the same."""

import hashlib
import re
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import muse_kernels
from muse_lightning.files import sha256_bytes

OURS = "muse-lightning"
PACKAGE_FOLDERS = (Path(__file__).resolve().parent.parent, Path(muse_kernels.__file__).resolve().parent)


@cache
def installed() -> dict[str, str]:
    """Version of every distribution that can be imported here, by normalised name; our own, which `source_sha256`
    tells more exactly, left out.

    Not the constraints file of a source tree, which says what should be installed.
    """
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        # Of two in different folders the first is imported; a damaged one has no name.
        if name is not None:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    found.pop(OURS, None)
    return dict(sorted(found.items()))


def lock_sha256() -> str:
    """SHA-256 over `name==version` of all that is installed, a line each, sorted."""
    return sha256_bytes("".join(f"{name}=={version}\n" for name, version in installed().items()).encode())


@cache
def source_sha256() -> str:
    """SHA-256 over our Python files, their paths and content: the same for a checkout and an installation of it, and
    another for a change that is not committed."""
    digest = hashlib.sha256()
    for folder in PACKAGE_FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(sha256_bytes(path.read_bytes()).encode())
    return digest.hexdigest()
