"""Repositories at a URL, cloned bare into a cache folder by git. Nothing of a clone is checked out or executed."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import unquote, urlsplit

from muse_lightning.errors import UserError, shown_url
from muse_lightning.files import exclusive_lock

# scheme://host/path, or scp's form user@host:path.
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+|[^/@:\s]+@[^/:\s]+:.+")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Of these git asks its credential helpers for a user and a password; ssh has keys.
_HAS_PASSWORDS = ("http", "https", "ftp", "ftps")
_PASSWORD_VARIABLE = "MUSE_GIT_PASSWORD"

# A server that sends nothing, not even word of its progress, for so long is given up.
_SILENCE_SECONDS = 120
_POLL_SECONDS = 1.0
# No hooks, no prompts, no submodules, no helper that a URL could name (ext::).
_SETTINGS = ("core.hooksPath=/dev/null", "protocol.ext.allow=never", "fetch.recurseSubmodules=false")
# What git tells of its progress, between which stands what went wrong.
_PROGRESS = re.compile(r"(remote: )?([A-Z][a-z]+ [a-z]+: +(\d|done)|Total \d).*|From .*|warning:.*|hint:.*|")


class _SilentServerError(UserError):
    """A server was given up."""


def is_git_url(location: str) -> bool:
    """Whether a location is for git to fetch, not a path on this machine: a URL, or `user@host:path`."""
    return _URL.fullmatch(location) is not None


def clone(url: str, revision: str, cache: Path, refresh: bool) -> Path:
    """A bare repository with the wanted revision, fetched if it is not in the cache yet.

    Of a branch, a tag or a full commit id only that commit is fetched, where the server allows it; for other
    revisions (HEAD~3) the whole history.

    Args:
        url: Anything git fetches from.
        revision: As git reads it.
        cache: Folder of the clones.
        refresh: Ask the server again for what is in the cache; a commit's full id is never asked for twice.
    Raises:
        UserError: git is missing, or cannot fetch it.
    """
    address, credentials = _without_credentials(url)
    key = hashlib.sha256(f"{address}\n{revision}".encode(errors="surrogateescape")).hexdigest()[:24]
    target = cache / f"{key}.git"
    with exclusive_lock(target):
        if target.exists() and not (refresh and not _COMMIT.fullmatch(revision)):
            return target
        partial = cache / f".{key}.{uuid.uuid4().hex[:8]}.partial"
        try:
            _Git(partial, address, credentials).fetch(revision)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _without_credentials(url: str) -> tuple[str, dict[str, str]]:
    """A URL that may stand in the list of processes, and variables by which git knows the user and the password of it.

    They are asked for by the server's address, so that another, to which that one refers, is not sent them.
    """
    parts = urlsplit(url)
    if parts.scheme not in _HAS_PASSWORDS:
        return url, {}
    if parts.query or parts.fragment:
        raise UserError(f"GitRepositories: {shown_url(url)}: a query found; give the URL of a repository")
    user_info, mark, host = parts.netloc.rpartition("@")
    if not mark:
        return url, {}
    user, has_password, password = (unquote(part) for part in user_info.partition(":"))
    if not (user + password).isprintable():
        raise UserError(f"GitRepositories: {shown_url(url)}: its user or password has characters that cannot be sent")
    address = f"{parts.scheme}://{host}"
    helper = f"!printf 'password=%s\\n' \"${_PASSWORD_VARIABLE}\"; :"
    settings = [("username", user), *([("helper", "")] if has_password else []), ("helper", helper)]
    count = os.environ.get("GIT_CONFIG_COUNT", "")
    first = int(count) if count.isdigit() else 0
    variables = {"GIT_CONFIG_COUNT": str(first + len(settings)), _PASSWORD_VARIABLE: password}
    for number, (key, value) in enumerate(settings, first):
        variables |= {f"GIT_CONFIG_KEY_{number}": f"credential.{address}.{key}", f"GIT_CONFIG_VALUE_{number}": value}
    return parts._replace(netloc=host).geturl(), variables


class _Git:
    """Git's commands on a new repository, without prompts and without waiting for ever."""

    def __init__(self, folder: Path, url: str, credentials: dict[str, str]) -> None:
        self.folder = folder
        self.url = url
        silent = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "SSH_ASKPASS": "true", "LC_ALL": "C"}
        self.environment = {**os.environ, **credentials, **silent}
        self._run("init", "--quiet", "--bare", "--template=", str(folder))
        if not {"GIT_SSH", "GIT_SSH_COMMAND"} & set(os.environ):
            chosen = ("git", "--git-dir", str(folder), "config", "--get", "core.sshCommand")
            if not subprocess.run(chosen, capture_output=True, stdin=subprocess.DEVNULL, check=False).stdout.strip():
                self.environment["GIT_SSH_COMMAND"] = "ssh -o BatchMode=yes"

    def fetch(self, revision: str) -> None:
        """Fetch a revision, and let HEAD name it."""
        git_dir = ("--git-dir", str(self.folder))
        fetch = (*git_dir, "fetch", "--progress", "--no-tags", "--no-write-fetch-head")
        try:
            # Under every name that the revision can be asked for by.
            self._run(*fetch, "--depth=1", "--", self.url, f"{revision}:refs/heads/wanted")
            pointed = "refs/heads/wanted"
        except _SilentServerError:
            raise
        except UserError:
            self._run(*fetch, "--", self.url, "+refs/*:refs/*", "+HEAD:refs/remotes/origin/HEAD")
            pointed = "refs/remotes/origin/HEAD"
        self._run(*git_dir, "symbolic-ref", "HEAD", pointed)

    def _run(self, *arguments: str) -> None:
        command = ("git", *(part for setting in _SETTINGS for part in ("-c", setting)), *arguments)
        with tempfile.TemporaryFile() as messages:
            try:
                # In a session of its own there is no terminal on which ssh, whatever its settings, could ask for a
                # password.
                process = subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=messages,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise UserError(
                    "GitRepositories: git is not installed; install it, or give local repositories"
                ) from error
            try:
                self._wait(process, messages)
            finally:
                if process.poll() is None:
                    # Its helpers too: ssh, git-remote-https.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if process.returncode:
                messages.seek(0)
                self._refuse(messages.read().decode(errors="replace"), process.returncode)

    def _wait(self, process: subprocess.Popen[bytes], messages: IO[bytes]) -> None:
        """Wait for git as long as it says or writes something."""
        before, since = (0, 0), time.monotonic()
        while True:
            try:
                process.wait(min(_POLL_SECONDS, _SILENCE_SECONDS))
                return
            except subprocess.TimeoutExpired:
                found = os.fstat(messages.fileno()).st_size, _folder_size(self.folder)
            if found != before:
                before, since = found, time.monotonic()
            elif time.monotonic() - since > _SILENCE_SECONDS:
                raise _SilentServerError(
                    f"GitRepositories: {shown_url(self.url)}: the server sent nothing for {_SILENCE_SECONDS} seconds; "
                    "check the address and the network"
                )

    def _refuse(self, messages: str, code: int) -> NoReturn:
        lines = [line.strip() for line in messages.splitlines()]
        # What ssh or the server says comes first, then git's own word, then advice.
        said = [line for line in lines if not _PROGRESS.fullmatch(line)][:2]
        reason = shown_url(" ".join(said) or f"git exit code {code}")
        if reason.endswith("couldn't find remote ref HEAD"):
            reason = "it has no commits"
        raise UserError(f"GitRepositories: {shown_url(self.url)}: {reason}; check the address and the revision")


def _folder_size(folder: Path) -> int:
    """Bytes of the files that lie in a folder; git may be moving some of them."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size
