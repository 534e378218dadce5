"""Jobs that run in parallel and survive a kill: each writes a folder of its own, which appears under its key when it is
whole and on the disk."""

import json
import os
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from muse_lightning.data.progress import StageProgress
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_write, fsync_path
from muse_lightning.safe_path import safe_path

_RESULT_NAME = "result.json"
_POLL_SECONDS = 0.25
# Jobs handed out ahead of the one whose result is waited for, per process: enough to keep all busy, few enough that the
# list of jobs need not be in memory.
_AHEAD = 4

Meter = Callable[[int, int, int], None]
"""Called while a job works, with what was done since the last call: bytes, files, tokens."""
Result = dict[str, Any] | Future[Any]
"""Of a job; one that a process of its own has done gives None, and its result lies in its folder."""
Submit = Callable[["Job"], Result]
"""Starts a job, or does it."""


class JobCancelledError(Exception):
    """Raised in a job that nobody waits for any more."""


class Job(ABC):
    """Work that depends on nothing but what it holds. Can be pickled."""

    key: str
    """Name of its folder: equal exactly when the result is equal."""
    size: int
    """Bytes of work, for progress."""

    @abstractmethod
    def run(self, folder: Path, context: Any, meter: Meter) -> dict[str, Any]:
        """Write files into an empty folder. Returns what is noted beside them: few and plain JSON values."""


def run_jobs(
    root: Path,
    jobs: Iterable[Job],
    progress: StageProgress,
    *,
    num_workers: int,
    context: Any = None,
    in_threads: bool = False,
) -> Generator[tuple[Path, dict[str, Any]], None, None]:
    """Run every job that has no finished folder yet.

    Args:
        root: Where the jobs' folders are. What is there and belongs to no job is removed once all are finished.
        jobs: Asked for as they are handed out.
        progress: Told of work done, now and before.
        num_workers: Jobs at a time; 1 runs them here.
        context: Passed to every job; sent to each process once.
        in_threads: Whether the jobs are run by threads of this process, not by processes of their own.
    Yields:
        Folder and result of each job, in the order of the jobs. A caller that stops asking stops the work.
    Raises:
        UserError: a process was killed.
        OSError, UserError: as raised by a job.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    keys = set()
    start = _run_here if num_workers <= 1 else _run_in_threads if in_threads else _run_in_processes
    with start(root, context, num_workers, progress) as submit:
        waiting: deque[tuple[Job, Result]] = deque()
        for job in jobs:
            keys.add(job.key)
            finished = _finished(root / job.key)
            if finished is not None:
                progress.was_done(job.size)
            waiting.append((job, finished if finished is not None else submit(job)))
            if len(waiting) >= (_AHEAD * num_workers if num_workers > 1 else 1):
                yield _next(root, waiting, progress)
        while waiting:
            yield _next(root, waiting, progress)
    for entry in root.iterdir():
        if entry.name not in keys:
            shutil.rmtree(entry, ignore_errors=True)


def _next(root: Path, waiting: deque[tuple[Job, Result]], progress: StageProgress) -> tuple[Path, dict[str, Any]]:
    job, result = waiting.popleft()
    if isinstance(result, Future):
        while not wait([result], timeout=_POLL_SECONDS).done:
            progress.show()
        progress.show()
        found = result.result() or _finished(root / job.key)
    else:
        found = result
    if found is None:
        raise UserError(f"{root / job.key} was changed while it was prepared; prepare again")
    return root / job.key, found


def _finished(folder: Path) -> dict[str, Any] | None:
    """The result of a job that an earlier call finished, if its files are all there."""
    try:
        noted = json.loads((folder / _RESULT_NAME).read_text())
        sizes = {name: (folder / name).stat().st_size for name in noted["sizes"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return noted["result"] if sizes == noted["sizes"] else None


def _run(job: Job, root: Path, context: Any, meter: Meter) -> dict[str, Any]:
    # The process id and the thread: another call's process may still be at the same job.
    temporary = root / f".{job.key}.partial-{os.getpid()}-{threading.get_ident()}"
    temporary.mkdir()
    try:
        result = job.run(temporary, context, meter)
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        for name in sizes:
            fsync_path(temporary / name)
        atomic_write(temporary / _RESULT_NAME, json.dumps({"sizes": sizes, "result": result}))
        final = root / job.key
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        fsync_path(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return result


@contextmanager
def _run_here(root: Path, context: Any, num_workers: int, progress: StageProgress) -> Iterator[Submit]:
    def meter(size: int, files: int, tokens: int) -> None:
        progress.add(size, files, tokens)
        progress.show()

    yield lambda job: _run(job, root, context, meter)


@contextmanager
def _run_in_threads(root: Path, context: Any, num_workers: int, progress: StageProgress) -> Iterator[Submit]:
    cancelled = threading.Event()

    def meter(size: int, files: int, tokens: int) -> None:
        if cancelled.is_set():
            raise JobCancelledError
        progress.add(size, files, tokens)

    with _closing(ThreadPoolExecutor(num_workers), cancelled.set) as pool:
        yield lambda job: pool.submit(_run, job, root, context, meter)


@contextmanager
def _run_in_processes(root: Path, context: Any, num_workers: int, progress: StageProgress) -> Iterator[Submit]:
    # spawn: a fork would copy the threads' locks of torch and of the tokenizer.
    processes = get_context("spawn")
    # Bytes, files, tokens; whether to stop. The processes lock it among themselves: this one must not wait for one that
    # was killed while it held the lock.
    counts: Any = processes.RawArray("q", 4)

    def cancel() -> None:
        counts[3] = 1

    progress.follow(counts)
    try:
        # With the first lock a process is started that keeps count of them.
        with safe_path():
            pool = ProcessPoolExecutor(
                num_workers,
                mp_context=processes,
                initializer=_start_worker,
                initargs=(root, context, counts, processes.Lock()),
            )
            with _closing(pool, cancel):
                yield lambda job: pool.submit(_run_in_worker, job)
    except BrokenProcessPool as error:
        raise UserError(
            "a preparation process was killed, most likely for lack of memory; what was finished is kept for the next "
            "call; use fewer data.prepare_workers, or smaller data.max_document_bytes or data.chunk_bytes"
        ) from error


@contextmanager
def _closing(pool: Executor, cancel: Callable[[], None]) -> Iterator[Executor]:
    """Wait for a pool; if the work is left early, stop what it is at."""
    try:
        yield pool
    except BaseException:
        cancel()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Path, Any, Any, Any]


def _start_worker(root: Path, context: Any, counts: Any, lock: Any) -> None:
    global _worker
    _worker = (root, context, counts, lock)
    # One thread per process: there are as many processes as the user wants busy cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # An interrupt from the keyboard reaches every process of the terminal; the parent ends these by `cancel`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        # A pool's processes would wait for ever for the next job of a parent that was killed.
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _run_in_worker(job: Job) -> None:
    """The result lies in the job's folder: of a long one, a process that is killed while it sends it would leave the
    parent waiting for the rest."""
    root, context, counts, lock = _worker

    def meter(size: int, files: int, tokens: int) -> None:
        if counts[3]:
            raise JobCancelledError
        with lock:
            counts[0] += size
            counts[1] += files
            counts[2] += tokens

    _run(job, root, context, meter)
