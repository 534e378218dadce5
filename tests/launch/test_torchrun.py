"""launch/torchrun.py ends with the code of a rank, where torchrun would end with 1."""

import os
import runpy
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import ProcessFailure, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from muse_lightning.errors import ExitCode

PATH = Path(__file__).parents[2] / "launch" / "torchrun.py"


def failed(*codes: int) -> ChildFailedError:
    """What torchrun raises of ranks that ended in this order."""
    failures = {rank: ProcessFailure(rank, 100 + rank, code, "none") for rank, code in enumerate(codes)}
    for rank, failure in failures.items():
        failure.timestamp = rank
    return ChildFailedError("muse", failures)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, ExitCode.DONE),
        *((failed(code, 1), code) for code in ExitCode if code != ExitCode.DONE),
        (failed(-signal.SIGKILL, ExitCode.BUG), 128 + signal.SIGKILL),
        (SignalException("SIGTERM", signal.SIGTERM), ExitCode.RETRY),
        (SignalException("SIGINT", signal.SIGINT), ExitCode.INTERRUPTED),
    ],
)
def test_the_exit_code_of_the_rank_that_failed_first(
    error: Exception | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    given: list[list[str]] = []

    def torchrun(arguments: list[str]) -> None:
        given.append(arguments)
        assert int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 300
        if error is not None:
            raise error

    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    assert runpy.run_path(str(PATH))["main"](["--nproc_per_node=2", "--", "fit", "--resume"]) == code
    assert given == [["--nproc_per_node=2", "--module", "muse_lightning.cli", "fit", "--resume"]]
    os.environ.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")


def test_the_separator_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert runpy.run_path(str(PATH))["main"](["fit"]) == ExitCode.USER_ERROR
    assert capsys.readouterr().err.startswith("error: no -- found; accepted: ")
