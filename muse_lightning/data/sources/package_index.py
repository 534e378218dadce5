"""Files of a Python package index, found and fetched without building anything.

Finding, hash checks and credentials are those of unearth, which was made out of pip's own for use as a library; pip
itself cannot fetch a source distribution without running its build backend.
"""

import ast
import errno
import shutil
import ssl
import subprocess
import sys
from functools import cache
from pathlib import Path

from muse_lightning.errors import UserError, reason_of

_ARCHIVES = (".tar.gz", ".zip", ".tar.bz2", ".tar.xz")
_TIMEOUT_SECONDS = 60.0
# Errors of the system that no network has.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class PackageIndex:
    """An index, and what pip's configuration says of how to reach it."""

    def __init__(self, url: str | None) -> None:
        """
        Args:
            url: The index; None: those of pip's configuration (files and PIP_... variables), else PyPI.
        Raises:
            UserError: the package unearth is not installed.
        """
        try:
            from unearth import PackageFinder
            from unearth.fetchers import PyPIClient
        except ImportError as error:
            raise UserError("PyPIPackages needs the package unearth: pip install 'muse-lightning[pypi]'") from error
        settings = pip_settings()
        certificates = settings.get("cert")
        indexes = [settings.get("index-url", "https://pypi.org/simple"), *settings.get("extra-index-url", "").split()]
        trusted_hosts = settings.get("trusted-host", "").split()
        session = PyPIClient(
            trusted_hosts=trusted_hosts,
            verify=ssl.create_default_context(cafile=certificates) if certificates else True,
            timeout=_TIMEOUT_SECONDS,
        )
        self._finder = PackageFinder(
            session,  # type: ignore[arg-type]  # unearth's own client; its signatures are wider than its protocol
            index_urls=[url] if url else indexes,
            trusted_hosts=trusted_hosts,
            # What runs on this machine is not asked: nothing will.
            ignore_compatibility=True,
        )

    def download(self, name: str, version: str, folder: Path) -> None:
        """Fetch the source distribution of a release, or a wheel where there is none, into a folder, and compare the
        index's digest.

        Raises:
            UserError: there is no such release, or the network fails.
            OSError: it cannot be written.
        """
        release = f"{name}=={version}"
        try:
            # Wheels of pure Python come before those of one platform, then the first by name: always the same one.
            links = sorted(
                (package.link for package in self._finder.find_matches(release)),
                key=lambda link: (link.is_wheel, not link.filename.endswith("-none-any.whl"), link.filename),
            )
            links = [link for link in links if link.is_wheel or link.filename.endswith(_ARCHIVES)]
            if not links:
                raise UserError(f"PyPIPackages: {release}: the index has no such release; check name and version")
            place = self._finder.download(links[0], folder)
            if place.parent != folder:
                shutil.copyfile(place, folder / place.name)
        except UserError:
            raise
        # The client raises errors of its own library and of the sockets below.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise
            raise UserError(f"PyPIPackages: {release}: {reason_of(error)}; check the index and the network") from error


@cache
def pip_settings() -> dict[str, str]:
    """What pip is configured with: its files, then variables such as PIP_INDEX_URL. Empty where pip is not there."""
    # -P: without it, Python would look for pip in the working directory first.
    command = [sys.executable, "-P", "-m", "pip", "config", "list"]
    output = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False).stdout
    found: dict[str, dict[str, str]] = {"global": {}, ":env:": {}}
    for line in output.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in found and value[:1] in ("'", '"'):
            found[section][name] = str(ast.literal_eval(value))
    return {**found["global"], **found[":env:"]}
