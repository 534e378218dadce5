"""tools/run_jobs.py: order, GPUs, what is done already, the end of the time, and mistakes in one line."""

import time
from pathlib import Path

import pytest
import yaml

from tools.run_jobs import main, read_jobs


def write(path: Path, *jobs: dict[str, object], **variables: str) -> str:
    path.write_text(yaml.safe_dump({"variables": variables, "jobs": list(jobs)}))
    return str(path)


def test_a_job_waits_for_what_it_needs_and_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    jobs = write(
        tmp_path / "jobs.yaml",
        {"name": "first", "command": "sleep 0.3; {{say}} first"},
        {"name": "second", "command": "{{say}} second", "needs": ["first"]},
        {"name": "third", "command": "{{say}} third"},
        say="{{to}} echo",
        to=f">>{log}",
    )
    assert main([jobs, str(tmp_path / "out"), "--devices", "0", "1"]) == 0
    assert log.read_text().split() == ["third", "first", "second"]
    assert main([jobs, str(tmp_path / "out"), "--devices", "0"]) == 0
    assert len(log.read_text().split()) == 3
    assert "was done" in capsys.readouterr().out
    # Another command of the same name is another job.
    (tmp_path / "jobs.yaml").write_text((tmp_path / "jobs.yaml").read_text().replace("}} third", "}} fourth"))
    assert main([jobs, str(tmp_path / "out"), "--devices", "0"]) == 0
    assert log.read_text().split()[3:] == ["fourth"]


def test_each_gpu_has_one_job_at_a_time_and_others_see_none(tmp_path: Path) -> None:
    command = f"echo $CUDA_VISIBLE_DEVICES >>{tmp_path}/begun; sleep 0.3; echo $CUDA_VISIBLE_DEVICES >>{tmp_path}/ended"
    jobs = [{"name": f"job{i}", "command": command} for i in range(4)]
    beside = {"name": "beside", "command": f"echo [$CUDA_VISIBLE_DEVICES] >{tmp_path}/beside", "device": False}
    file = write(tmp_path / "jobs.yaml", *jobs, beside)
    began = time.monotonic()
    assert main([file, str(tmp_path / "out"), "--devices", "5", "7"]) == 0
    assert 0.6 < time.monotonic() - began < 1.15
    for name in ("begun", "ended"):
        assert sorted((tmp_path / name).read_text().split()) == ["5", "5", "7", "7"]
    assert (tmp_path / "beside").read_text() == "[]\n"


def test_a_failure_stops_what_needs_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(
        tmp_path / "jobs.yaml",
        {"name": "fails", "command": "echo said; exit 3"},
        {"name": "needs", "command": "true", "needs": ["fails"]},
        {"name": "other", "command": "true"},
    )
    assert main([file, str(tmp_path / "out"), "--devices", "0"]) == 1
    became = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-3:])
    assert became["fails"].startswith("failed 3")
    assert became["needs"] == "not reached"
    assert became["other"].startswith("done")
    assert (tmp_path / "out" / "fails.log").read_text() == "said\n"


def test_the_time_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What runs at the end is told so, with what it has started; what would take longer is not begun."""
    waits = f"trap 'echo told >{tmp_path}/told; exit 1' TERM; sleep 30 & wait"
    file = write(
        tmp_path / "jobs.yaml",
        {"name": "long", "command": "true", "seconds": 60},
        {"name": "waits", "command": waits},
    )
    began = time.monotonic()
    assert main([file, str(tmp_path / "out"), "--devices", "0", "1", "--seconds", "0.5"]) == 1
    assert time.monotonic() - began < 5
    became = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert became["long"] == "not reached"
    assert became["waits"].startswith("ended")
    assert (tmp_path / "told").read_text() == "told\n"


def test_some_of_the_jobs_with_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(
        tmp_path / "jobs.yaml",
        {"name": "a", "command": "say a"},
        {"name": "b", "command": "say b", "needs": ["a"]},
        {"name": "c", "command": "say c", "needs": ["b"]},
        {"name": "d", "command": "say d"},
    )
    assert main([file, str(tmp_path / "out"), "--only", "b", "--list"]) == 0
    assert capsys.readouterr().out == "a: say a\nb: say b\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("jobs", "variables", "message"),
    [
        ([{"name": "a"}], {}, "job a: fields name found; accepted: name, command, needs, seconds, device"),
        ([{"name": "a", "command": "b", "gpus": 2}], {}, "gpus, name found; accepted: name, command, needs"),
        ([{"name": "a", "command": "b", "needs": ["c"]}], {}, "job a: needs c, no job above it"),
        ([{"name": "a", "command": "b"}] * 2, {}, "job a: is there twice"),
        ([{"name": "a", "command": "{{b}}"}], {"c": "d"}, "variable b: there are c"),
        ([{"name": "a", "command": "{{b}}"}], {"b": "{{b}}"}, "a variable is part of itself: {{b}}"),
        (["a"], {}, "expected `jobs`, a list of mappings"),
    ],
)
def test_mistakes_are_named(
    jobs: list[dict[str, object]],
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / "jobs.yaml", *jobs, **variables)
    with pytest.raises(SystemExit) as ended:
        main([file, str(tmp_path / "out"), "--devices", "0"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "jobs.yaml", {"name": "a", "command": "b"})
    with pytest.raises(SystemExit):
        main([file, str(tmp_path / "out"), "--only", "x", "--list"])
    assert "job x: there are a" in capsys.readouterr().err


def test_read_jobs_joins_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "jobs.yaml", {"name": "a", "command": "muse fit\n  --config x\n"})
    assert read_jobs(Path(file))[0].command == "muse fit --config x"
