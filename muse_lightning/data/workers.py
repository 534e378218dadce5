"""Processes that read batches: what ends them, and what their end means."""

import os
import signal
import threading

from muse_lightning.errors import causes


class DataWorkerError(RuntimeError):
    """A worker process died."""

    def __init__(self) -> None:
        super().__init__("a data worker died: killed, or out of memory; try fewer data.num_workers")


def outlive_preemption(worker: int) -> None:
    """Let SIGTERM end this worker only if the training process sent it.

    Who preempts a run often signals all of its processes. A worker that died of that would end the training process,
    by torch's handler of SIGCHLD, in the middle of the step that it is about to finish and save. Workers end with
    their training process in any case: torch's loop looks whether it is still there.

    Args:
        worker: its number, which torch passes.
    """
    # Blocked, not handled: only who waits for a signal learns who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for_the_trainer, args=(os.getppid(),), name="sigterm", daemon=True).start()


def _end_for_the_trainer(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(-signal.SIGTERM)


def death_of_worker(error: BaseException) -> RuntimeError | None:
    """torch's error of a data worker that was killed, at or behind an error; None if there is none.

    torch raises it wherever the training happens to be when the signal comes that a child has died.
    """
    of_torch = (found for found in causes(error) if isinstance(found, RuntimeError))
    return next((found for found in of_torch if "DataLoader worker (pid" in str(found)), None)
