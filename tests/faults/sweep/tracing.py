"""System calls of one thread, recorded, and one of them made to fail or to kill, by strace."""

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

WRITES = ("write", "pwrite64", "writev", "sendfile", "copy_file_range", "ftruncate", "truncate", "fallocate")
SYNCS = ("fsync", "fdatasync")
OPENS = ("open", "openat", "creat")
RENAMES = ("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat")
REMOVALS = ("unlink", "unlinkat", "rmdir")
FOLDERS = ("mkdir", "mkdirat")
READS = ("read", "pread64", "getdents64", "stat", "lstat", "fstat", "newfstatat", "statx", "close", "flock", "lseek")
MARKS = ("access", "faccessat", "faccessat2")
_TRACED = ",".join(f"?{name}" for name in (*WRITES, *SYNCS, *OPENS, *RENAMES, *REMOVALS, *FOLDERS, *READS, *MARKS))
_LINE = re.compile(r"(?P<name>\w+)\((?P<arguments>.*?)(?:\)\s+= (?P<result>\S+)(?P<rest>.*)| <unfinished \.\.\.>)$")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"|<([^<>]*)>')


@dataclass(frozen=True)
class Call:
    """One system call."""

    name: str
    number: int
    """The how-manieth of this name in its thread, from 1."""
    paths: tuple[str, ...]
    """Paths among its arguments, descriptors as the paths they are open for; the folder of a relative path first."""
    flags: str
    """All its arguments as text."""
    error: str
    """ENOSPC and so on; empty where it succeeded."""
    was_injected: bool

    @property
    def creates(self) -> bool:
        """Whether it opens for writing."""
        return self.name == "creat" or (self.name in OPENS and "O_RDONLY" not in self.flags)

    @property
    def changes(self) -> bool:
        """Whether it may change what is on the disk, or what is surely there."""
        return self.name in (*WRITES, *SYNCS, *RENAMES, *REMOVALS, *FOLDERS) or self.creates

    def within(self, folder: Path) -> bool:
        """Whether it is about something in a folder, or the folder itself."""
        return any(path == str(folder) or path.startswith(f"{folder}/") for path in self.paths)


@functools.cache
def why_not() -> str | None:
    """Why no system call can be traced here; None if it can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    with tempfile.NamedTemporaryFile() as log:
        tried = subprocess.run([strace, "-o", log.name, "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()[-200:]}"


class Tracer:
    """strace attached to one thread until that ends.

    Args:
        thread: its id.
        log: the file that gets the system calls.
        injections: as strace's option `inject` has them: "fsync:error=EIO:when=3".
    Raises:
        RuntimeError: it cannot be attached.
    """

    def __init__(self, thread: int, log: Path, injections: tuple[str, ...]) -> None:
        options = [f"--inject={injection}" for injection in injections]
        command = ["strace", "-p", str(thread), "-o", str(log), "-y", "-s", "0", "-e", f"trace={_TRACED}", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._log = log
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        # After this line the thread stops before it does anything else.
        if "attached" not in line:
            self._process.wait()
            raise RuntimeError(f"strace: {line.strip()}")

    def finish(self) -> list[Call]:
        """Once the process has ended: its calls."""
        self._process.communicate(timeout=30)
        return parse(self._log.read_text(errors="replace"))


def parse(log: str) -> list[Call]:
    """Calls of a log that strace has written with -y."""
    calls = []
    counts: dict[str, int] = {}
    for line in log.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, arguments = match["name"], match["arguments"]
        counts[name] = counts.get(name, 0) + 1
        rest = match["rest"] or ""
        error = rest.split()[0] if match["result"] == "-1" else "" if match["result"] not in (None, "?") else "killed"
        found = ((quoted or opened).removesuffix(" (deleted)") for quoted, opened in _PATH.findall(arguments))
        paths = tuple(filter(None, found))
        calls.append(Call(name, counts[name], paths, arguments, error, "(INJECTED)" in rest))
    return calls
