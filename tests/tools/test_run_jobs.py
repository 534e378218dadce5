"""tools/run_jobs.py: order, GPUs, what is done already, the end of the time, and mistakes in one line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tools import run_jobs
from tools.run_jobs import main


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
    command = f"echo +$CUDA_VISIBLE_DEVICES >>{tmp_path}/log; sleep 0.3; echo -$CUDA_VISIBLE_DEVICES >>{tmp_path}/log"
    jobs = [{"name": f"job{i}", "command": command} for i in range(4)]
    beside = {"name": "beside", "command": f"echo [$CUDA_VISIBLE_DEVICES] >{tmp_path}/beside", "device": False}
    file = write(tmp_path / "jobs.yaml", *jobs, beside)
    assert main([file, str(tmp_path / "out"), "--devices", "5", "7"]) == 0
    log = (tmp_path / "log").read_text().split()
    for device in ("5", "7"):
        assert [line[0] for line in log if line[1:] == device] == ["+", "-", "+", "-"]
    assert {*log[:2]} == {"+5", "+7"}
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


SAVES = """import signal, sys, time
def save(*_):
    time.sleep(0.5)
    print("saved", file=open(sys.argv[1], "w"))
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("waits", flush=True)
time.sleep(30)"""
"""Takes its time over SIGTERM, as a training does that is preempted."""


def saving(tmp_path: Path) -> str:
    """Two jobs that bash waits for, in a file."""
    (tmp_path / "saves.py").write_text(SAVES)
    command = f"true; {sys.executable} {tmp_path}/saves.py {tmp_path}/saved"
    return write(tmp_path / "jobs.yaml", *({"name": name, "command": f"{command}-{name}; true"} for name in "ab"))


def test_sigterm_ends_the_jobs_as_well(tmp_path: Path) -> None:
    """And what bash waits for has its time to end."""
    command = [sys.executable, run_jobs.__file__, saving(tmp_path), str(tmp_path / "out"), "--devices", "0", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        logs = [tmp_path / "out" / f"{name}.log" for name in "ab"]
        while not all(log.is_file() and log.read_text() for log in logs):
            time.sleep(0.05)
        process.terminate()
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert [line.split()[:2] for line in out.splitlines()] == [["a", "ended"], ["b", "ended"]]
    assert [(tmp_path / f"saved-{name}").read_text() for name in "ab"] == ["saved\n"] * 2


def test_gpus_are_counted_without_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    file = write(
        tmp_path / "jobs.yaml",
        *({"name": name, "command": f"echo $CUDA_VISIBLE_DEVICES >>{tmp_path}/log; sleep 0.3"} for name in "abc"),
    )
    assert main([file, str(tmp_path / "out")]) == 0
    assert set((tmp_path / "log").read_text().split()) == {"0", "1"}


def test_without_a_gpu_it_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    beside = {"name": "beside", "command": "true", "device": False}
    file = write(tmp_path / "jobs.yaml", beside, {"name": "a", "command": "true"})
    with pytest.raises(SystemExit):
        main([file, str(tmp_path / "out")])
    assert "no GPU is there; accepted: --devices" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([file, str(tmp_path / "out"), "--only", "beside"]) == 0


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
        (3, {}, "expected `jobs`, a list of mappings"),
        ([{"name": "a", "command": "b"}], ["c"], "expected `variables`, a mapping of names to texts"),
        ([{"name": "a", "command": "b"}], {"c": 3}, "expected `variables`, a mapping of names to texts"),
        ([{"name": 3, "command": "b"}], {}, "job 3: name 3 found; accepted: a text without /"),
        ([{"name": "a/b", "command": "c"}], {}, "job a/b: name 'a/b' found; accepted: a text without /"),
        ([{"name": "a", "command": 3}], {}, "job a: command 3 found; accepted: a text"),
        ([{"name": "a", "command": "b", "needs": "c"}], {}, "job a: needs 'c' found; accepted: a list of names"),
        ([{"name": "a", "command": "b", "seconds": "c"}], {}, "job a: seconds 'c' found; accepted: a number"),
        ([{"name": "a", "command": "b", "device": 1}], {}, "job a: device 1 found; accepted: true or false"),
    ],
)
def test_mistakes_are_named(
    jobs: object,
    variables: object,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump({"variables": variables, "jobs": jobs}))
    with pytest.raises(SystemExit) as ended:
        main([str(file), str(tmp_path / "out"), "--devices", "0"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "jobs.yaml", {"name": "a", "command": "b"})
    with pytest.raises(SystemExit):
        main([file, str(tmp_path / "out"), "--only", "x", "--list"])
    assert "job x: there are a" in capsys.readouterr().err


def test_a_command_may_have_lines(tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(
        "jobs:\n- name: a\n  command: |\n    echo 1  # one\n    echo {{ x }}\nvariables: {x: '2'}\n"
    )
    assert main([str(tmp_path / "jobs.yaml"), str(tmp_path / "out"), "--devices", "0"]) == 0
    assert (tmp_path / "out" / "a.log").read_text() == "1\n2\n"


def test_what_needs_a_changed_job_runs_again(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def call(said: str, *only: str) -> list[str]:
        log.write_text("")
        a = {"name": "a", "command": f"echo {said} >>{log}"}
        b = {"name": "b", "command": f"echo b >>{log}", "needs": ["a"]}
        file = write(tmp_path / "jobs.yaml", a, b, {"name": "c", "command": f"echo c >>{log}"})
        assert main([file, str(tmp_path / "out"), "--devices", "0", *only]) == 0
        return log.read_text().split()

    assert sorted(call("a")) == ["a", "b", "c"]
    assert call("a") == []
    assert call("other", "--only", "a") == ["other"]
    # Later too, when the changed one is done.
    assert call("other") == ["b"]
    assert call("other") == []
