"""benchmarks/parity.yaml: its commands are accepted, and a job needs those whose results it reads."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from muse_lightning.cli import main
from tools.run_jobs import Job, read_jobs

ROOT = Path(__file__).parent.parent
JOBS = read_jobs(ROOT / "benchmarks" / "parity.yaml")
VALIDATED = re.compile(r"--(?:model\.weights|ckpt_path)[= ]runs/([^/]+)/version_0/checkpoints/step=(\d+)\.ckpt")


def configuration(job: Job, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*shlex.split(job.command)[1:], "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("job", [job for job in JOBS if job.command.startswith("muse ")], ids=lambda job: job.name)
def test_every_command_is_accepted(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = configuration(job, capsys)
    if job.command.startswith("muse fit"):
        assert found["run"]["name"] == job.name
        # What was ended goes on in version_0, where the jobs behind it look.
        assert found["resume"] or found["ckpt_path"]
        # The weights that a training ends with are validated, and there for jobs behind it.
        assert int(str(found["trainer"]["max_steps"])) % int(str(found["trainer"]["val_check_interval"])) == 0


@pytest.mark.parametrize("job", [job for job in JOBS if "runs/" in job.command], ids=lambda job: job.name)
def test_a_job_needs_the_runs_that_it_reads(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert set(re.findall(r"runs/([^/ ]+)/version_0", job.command)) <= set(job.needs)
    for name, step in VALIDATED.findall(job.command):
        trainer = configuration(next(other for other in JOBS if other.name == name), capsys)["trainer"]
        callbacks = {each["class_path"].rpartition(".")[2]: each["init_args"] for each in trainer["callbacks"]}
        saved = callbacks["DurableCheckpoint"]
        end = callbacks["StopAfter"]["step"] if "StopAfter" in callbacks else trainer["max_steps"]
        steps = {
            *range(0, end + 1, trainer["val_check_interval"]),
            *range(0, end + 1, saved["every_n_steps"]),
        }
        assert int(step) in sorted(steps)[-saved["keep_last"] :]
