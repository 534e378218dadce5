"""Repositories at a URL, cloned bare into a cache folder by git. Nothing of a clone is checked out or executed."""

import hashlib
import os
import re
import shutil
import subprocess
import uuid
from pathlib import Path

from muse_lightning.errors import UserError, shown_url
from muse_lightning.files import exclusive_lock

# scheme://host/path, or scp's form user@host:path.
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+|[^/@:\s]+@[^/:\s]+:.+")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# A server that is silent for so long is given up. One that packs a large repository sends a few bytes now and then.
_SILENCE_SECONDS = 120
# No hooks, no prompts, no submodules, no helper that a URL could name (ext::).
_SETTINGS = (
    "core.hooksPath=/dev/null",
    "protocol.ext.allow=never",
    "fetch.recurseSubmodules=false",
    "http.lowSpeedLimit=1",
)
_SSH = "ssh -o BatchMode=yes -o ConnectTimeout={0} -o ServerAliveInterval={0} -o ServerAliveCountMax=1"


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
    key = hashlib.sha256(f"{url}\n{revision}".encode(errors="surrogateescape")).hexdigest()[:24]
    target = cache / f"{key}.git"
    with exclusive_lock(target):
        if target.exists() and not (refresh and not _COMMIT.fullmatch(revision)):
            return target
        partial = cache / f".{key}.{uuid.uuid4().hex[:8]}.partial"
        try:
            _git(url, "init", "--quiet", "--bare", "--template=", str(partial))
            _fetch(url, revision, partial)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _fetch(url: str, revision: str, repository: Path) -> None:
    fetch = ("--git-dir", str(repository), "fetch", "--quiet", "--no-tags", "--no-write-fetch-head")
    try:
        # Under every name that the revision can be asked for by.
        _git(url, *fetch, "--depth=1", "--", url, f"{revision}:refs/heads/wanted")
        pointed = "refs/heads/wanted"
    except UserError:
        _git(url, *fetch, "--", url, "+refs/*:refs/*", "+HEAD:refs/remotes/origin/HEAD")
        pointed = "refs/remotes/origin/HEAD"
    _git(url, "--git-dir", str(repository), "symbolic-ref", "HEAD", pointed)


def _git(url: str, *arguments: str) -> None:
    settings = (*_SETTINGS, f"http.lowSpeedTime={_SILENCE_SECONDS}")
    command = ("git", *(part for setting in settings for part in ("-c", setting)), *arguments)
    try:
        # In a session of its own there is no terminal on which ssh, whatever its settings, could ask for a password.
        subprocess.run(
            command,
            env=_environment(),
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise UserError("GitRepositories: git is not installed; install it, or give local repositories") from error
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in error.stderr.decode(errors="replace").splitlines()]
        # What ssh or the server says comes first, then git's own word, then advice.
        said = [line for line in lines if line and not line.startswith(("warning:", "hint:"))][:2]
        reason = shown_url(" ".join(said) or f"git exit code {error.returncode}")
        if reason.endswith("couldn't find remote ref HEAD"):
            reason = "it has no commits"
        raise UserError(f"GitRepositories: {shown_url(url)}: {reason}; check the address and the revision") from error


def _environment() -> dict[str, str]:
    """Git's variables: no prompts, and an ssh that gives up, unless the user has chosen another."""
    chosen = {"GIT_SSH", "GIT_SSH_COMMAND"} & set(os.environ) or subprocess.run(
        ("git", "config", "--get", "core.sshCommand"), capture_output=True, stdin=subprocess.DEVNULL, check=False
    ).stdout.strip()
    ssh = {} if chosen else {"GIT_SSH_COMMAND": _SSH.format(_SILENCE_SECONDS)}
    silent = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "SSH_ASKPASS": "true", "LC_ALL": "C"}
    return {**os.environ, **ssh, **silent}
