"""The launch files: valid to their schedulers, true to the exit codes, with command lines that `muse` accepts."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from muse_lightning.cli import main
from muse_lightning.errors import ExitCode

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
LAUNCH = Path(__file__).parents[2] / "launch"
KUBERNETES = LAUNCH / "kubernetes"
KUBERNETES_VERSION = "1.31"
"""The first whose podFailurePolicy is stable."""
IMAGE = "registry.example.com/muse-lightning:gpu"
FAILURES = {int(code) for code in ExitCode if code != ExitCode.DONE}
SKY = {
    "RECIPE": "recipe:llama-150m-64k-muse",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}


def documents(name: str) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8"))


def job() -> dict[str, Any]:
    (found,) = documents("job.yaml")
    return found


def jobset() -> dict[str, Any]:
    (found,) = documents("jobset.yaml")
    return found


def job_of_set() -> dict[str, Any]:
    """What JobSet makes of its template."""
    (of_nodes,) = jobset()["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "muse"}, **of_nodes["template"]}


def container(of_job: dict[str, Any]) -> dict[str, Any]:
    (found,) = of_job["spec"]["template"]["spec"]["containers"]
    return found


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))


def run_shell(script: Path, folder: Path, environment: dict[str, str], *args: str, **stubs: str) -> tuple[int, str]:
    """Exit code of a script, and the lines of the stubs that stand for the programs that it calls, with arguments."""
    calls = folder / "calls"
    calls.touch()
    for name, body in stubs.items():
        stub = folder / name
        stub.write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> {calls}; echo >> {calls}\n{body}\n')
        stub.chmod(0o755)
    path = f"{folder}:/usr/bin:/bin"
    command = ["bash", "-eu" if script.suffix == ".sh" else "-u", script, *args]
    done = subprocess.run(
        command, env={"PATH": path, "HOME": str(folder), **environment}, cwd=folder, capture_output=True, text=True
    )
    return done.returncode, calls.read_text()


def is_accepted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whether `muse` takes a command line: it prints the configuration that it means."""
    capsys.readouterr()
    code = main([*arguments, "--print_config"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["config"]["hidden_size"] == 1024


@pytest.mark.parametrize("given", [job(), job_of_set(), *documents("volumes.yaml")], ids=lambda given: given["kind"])
def test_kubernetes_has_such_fields(given: dict[str, Any]) -> None:
    kubernetes_validate.validate(given, KUBERNETES_VERSION, strict=True)


def test_a_job_of_one_node_ends_or_comes_again_by_the_exit_codes() -> None:
    spec = job()["spec"]
    fail, again, disrupted = spec["podFailurePolicy"]["rules"]
    name = container(job())["name"]
    assert fail == {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": name,
            "operator": "In",
            "values": sorted(FAILURES - {ExitCode.RETRY}),
        },
    }
    assert again == {
        "action": "Ignore",
        "onExitCodes": {"containerName": name, "operator": "In", "values": [ExitCode.RETRY]},
    }
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert spec["podReplacementPolicy"] == "Failed", "two pods in one run's folder"


def test_a_set_of_several_nodes_starts_again_as_a_whole_by_the_exit_codes() -> None:
    spec, name = job_of_set()["spec"], container(job_of_set())["name"]
    assert spec["backoffLimit"] == 0, "a pod that comes back alone finds nobody"
    assert spec["parallelism"] == spec["completions"]
    values = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    # Ranks end with 1 when another has died: that alone is no bug of ours.
    assert values == [sorted(FAILURES - {ExitCode.RETRY, ExitCode.BUG}), [ExitCode.RETRY]]
    again, never = jobset()["spec"]["failurePolicy"]["rules"]
    assert again["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert never["action"] == "FailJobSet"
    # The messages of Kubernetes' Job controller.
    for said, is_again in (
        *(
            (f"Container {name} for pod default/muse-node-0-0 failed with exit code {code} matching FailJob rule", code)
            for code in FAILURES
        ),
        ("Pod default/muse-node-0-0 has condition DisruptionTarget matching FailJob rule at index 2", ExitCode.RETRY),
    ):
        patterns = again["onJobFailureMessagePatterns"]
        assert any(re.search(pattern, said) for pattern in patterns) == (is_again == ExitCode.RETRY), said
    for rule in (again, never):
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]), "JobSet's webhook"


def test_the_nodes_of_a_set_find_each_other() -> None:
    name, (of_nodes,) = jobset()["metadata"]["name"], jobset()["spec"]["replicatedJobs"]
    variables = {entry["name"]: entry for entry in container(job_of_set())["env"]}
    assert variables["MASTER_ADDR"]["value"] == f"{name}-{of_nodes['name']}-0-0.{name}"
    assert "job-completion-index" in variables["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    flags = container(job_of_set())["args"]
    assert f"--trainer.num_nodes={job_of_set()['spec']['completions']}" in flags


def test_a_set_waits_in_the_queue_that_there_is() -> None:
    flavor, cluster, local = documents("queue.yaml")
    assert jobset()["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    (group,) = cluster["spec"]["resourceGroups"]
    assert [entry["name"] for entry in group["flavors"]] == [flavor["metadata"]["name"]]
    quotas = {entry["name"]: entry["nominalQuota"] for entry in group["flavors"][0]["resources"]}
    assert list(quotas) == group["coveredResources"]
    limits = container(job_of_set())["resources"]["limits"]
    assert int(quotas["nvidia.com/gpu"]) == job_of_set()["spec"]["completions"] * int(limits["nvidia.com/gpu"])


@pytest.mark.parametrize("given", [job(), job_of_set()], ids=["job", "jobset"])
def test_a_pod_is_confined_and_accepted(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pod, muse = given["spec"]["template"]["spec"], container(given)
    assert muse["image"] == IMAGE
    assert pod["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert muse["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounted = {mount["name"]: mount["mountPath"] for mount in muse["volumeMounts"]}
    assert mounted == {"runs": "/runs", "data": "/data", "tmp": "/tmp", "shm": "/dev/shm"}
    claims = {document["metadata"]["name"] for document in documents("volumes.yaml")}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == mounted.keys()
    used = {
        entry["persistentVolumeClaim"]["claimName"]
        for entry in volumes.values()
        if len(entry) == 2 and "persistentVolumeClaim" in entry
    }
    assert used == claims
    assert f"--trainer.devices={muse['resources']['limits']['nvidia.com/gpu']}" in muse["args"]
    assert "--resume" in muse["args"]
    is_accepted(muse["args"], capsys)


def test_a_managed_job_recovers_by_the_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = skypilot()
    assert task["resources"]["job_recovery"] == {
        "recover_on_exit_codes": [ExitCode.RETRY],
        "max_restarts_on_errors": 0,
    }
    assert task["envs"]["IMAGE"] == IMAGE
    # A mount without a cache of what is written cannot append to a ledger.
    assert {path: mount["mode"] for path, mount in task["file_mounts"].items()} == {
        "/runs": "MOUNT_CACHED",
        "/data": "MOUNT",
    }
    script = tmp_path / "run.sh"
    script.write_text(task["run"])
    code, calls = run_shell(script, tmp_path, task["envs"] | SKY, docker="exit 75")
    assert code == ExitCode.RETRY
    assert "MASTER_ADDR=10.0.0.1 " in calls
    assert "NODE_RANK=1 " in calls
    _, _, command = calls.partition(f" {IMAGE} ")
    assert "--trainer.num_nodes=2" in command.split()
    is_accepted(command.split(), capsys)


@pytest.mark.parametrize("kind", ["pyxis", "apptainer", "none"])
def test_slurm_starts_a_rank_per_gpu(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "--config=recipe:llama-150m-64k-muse"
    stated = tmp_path / "stated.yaml"  # as the configuration that a run leaves
    stated.write_text("resume: false\ntrainer: {devices: auto, num_nodes: 1}\n")
    code, calls = run_shell(
        LAUNCH / "slurm.sbatch", tmp_path, SLURM | {"CONTAINER": kind}, recipe, f"--config={stated}", srun="exit 0"
    )
    assert code == 0
    assert calls.count("\n") == 1, "requeued"
    before, _, command = calls.partition(" muse ")
    assert ("--container-image=registry.example.com" in before) == (kind == "pyxis")
    assert ("apptainer exec --nv" in before) == (kind == "apptainer")
    assert {"--trainer.num_nodes=2", "--trainer.devices=8", "--resume", recipe} <= set(command.split())
    is_accepted(command.split(), capsys)


@pytest.mark.parametrize(
    ("code", "state", "restarts", "is_requeued"),
    [
        (ExitCode.RETRY, "RUNNING", 0, True),
        # scancel, too, lets the ranks save and end with 75.
        (ExitCode.RETRY, "COMPLETING", 0, False),
        (ExitCode.RETRY, "RUNNING", 1000, False),
        *((ExitCode(other), "RUNNING", 0, False) for other in sorted(FAILURES - {ExitCode.RETRY})),
        (137, "RUNNING", 0, False),
    ],
)
def test_slurm_requeues_by_the_exit_code(
    code: int, state: str, restarts: int, is_requeued: bool, tmp_path: Path
) -> None:
    ended, calls = run_shell(
        LAUNCH / "slurm.sbatch",
        tmp_path,
        SLURM | {"SLURM_RESTART_COUNT": str(restarts)},
        srun=f"exit {int(code)}",
        squeue=f"echo {state}",
        scontrol="",
    )
    assert ended == code
    assert ("scontrol requeue 7 " in calls) == is_requeued


def test_slurm_refuses_an_unknown_container(tmp_path: Path) -> None:
    assert run_shell(LAUNCH / "slurm.sbatch", tmp_path, SLURM | {"CONTAINER": "docker"})[0] == ExitCode.USER_ERROR
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name", ["slurm.sbatch", "torchrun.py", "skypilot.yaml", "kubernetes/job.yaml", "kubernetes/jobset.yaml"]
)
def test_a_recipe_of_prepared_data_looks_for_no_sources(name: str) -> None:
    text = re.sub(r"\\\n[# ]*", "", (LAUNCH / name).read_text())
    commands = re.findall(r"fit\W+--config=(?!\.\.\.).*(?:\n +- .*)*|sbatch --config=.*", text)
    assert commands
    assert all("--data.sources=null" in command for command in commands), commands


def test_scripts_are_clean(tmp_path: Path) -> None:
    run = tmp_path / "run.sh"
    run.write_text(f"#!/bin/bash\n{skypilot()['run']}")
    for script in (LAUNCH / "slurm.sbatch", run):
        done = subprocess.run([SHELLCHECK, "--shell=bash", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
