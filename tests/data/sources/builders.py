"""Places of every kind that a source reads, with the same repositories in them, and hostile ones."""

import io
import json
import os
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from muse_lightning.data.documents import DocumentSource, ReadLimits, SourceUnit

LIMITS = ReadLimits(max_file_bytes=10_000, max_members=500, max_unpacked_bytes=80 << 20, max_ratio=50)

# Two small repositories, as paths and contents. `trap` leaves a file behind if anything runs or imports it.
REPOSITORIES = {
    "alpha": {"README.md": b"# Alpha\n", "src/a.py": b"a = 1\n", "src/b.py": b"b = 2\n"},
    "trap": {"setup.py": b"open('trace', 'w')\n", "trap/__init__.py": b"open('trace', 'w')\n"},
}


def write(path: Path, content: bytes = b"x = 1\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for path, content in files.items():
        write(root / path, content)
    return root


def tar(path: Path, members: Sequence[tuple[tarfile.TarInfo | str, bytes]], mode: str = "w:gz") -> Path:
    """A tar archive of exactly these members; a name stands for a regular file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for entry, content in members:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    """A member that is no regular file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def zipped(path: Path, members: Sequence[tuple[zipfile.ZipInfo | str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in members:
            archive.writestr(entry, content)
    return path


def git(folder: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "a@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    dates = {"GIT_AUTHOR_DATE": "2020-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z"}
    environment = {**os.environ, **names, **dates, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ("git", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false", *arguments)
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def git_repository(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A repository with one commit of these files."""
    write_tree(folder, files)
    git(folder, "init", "--quiet")
    commit_all(folder)
    return folder


def commit_all(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "change")
    return git(folder, "rev-parse", "HEAD")


def json_lines(path: Path, rows: Sequence[object]) -> Path:
    return write(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def contents(source: DocumentSource, limits: ReadLimits = LIMITS) -> dict[str, dict[str, bytes]]:
    """Everything that training would see, by repository and path; what is for the licence alone is left out."""
    found: dict[str, dict[str, bytes]] = {}
    for unit in source.units():
        for repository in unit.read(limits):
            files = found.setdefault(repository.name, {})
            files.update((file.path, file.content) for file in repository.files if not file.for_licence)
    return found


def read_all(unit: SourceUnit, limits: ReadLimits = LIMITS) -> int:
    """Read a unit to its end; the number of files."""
    return sum(1 for repository in unit.read(limits) for _ in repository.files)


def counted(source: DocumentSource, limits: ReadLimits = LIMITS) -> dict[str, int]:
    """What a source leaves out, by reason."""
    skipped: Counter[str] = Counter()
    for unit in source.units():
        for repository in unit.read(limits):
            for _ in repository.files:
                pass
            skipped.update(repository.skipped)
    return dict(skipped)
