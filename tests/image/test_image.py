"""Dockerfile, .dockerignore and compose files fit one another; tools/image_check.sh builds and runs the image."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from muse_lightning.cli import main
from tools.image import layers

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
ON_GPUS: dict[str, Any] = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text(encoding="utf-8"))


def test_the_image_is_built_from_paths_that_exist_and_that_the_build_may_see() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    paths = {path.split("/")[0] for entry in copied for path in entry.split()}
    admitted = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"
    }
    assert "muse_lightning" in paths
    assert paths == admitted
    assert all((ROOT / path).exists() for path in paths)


def test_the_base_is_named_by_its_digest_and_all_packages_by_theirs() -> None:
    assert re.search(r"^ARG BASE_IMAGE=docker\.io/library/\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, flags=re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE)) == {"${BASE_IMAGE}", "python", "pip"}
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert len(installs) == 3
    assert all("--require-hashes --only-binary :all:" in line or "--no-index" in line for line in installs)


def test_the_image_is_for_any_user_and_what_is_written_goes_to_the_volumes() -> None:
    assert "USER 10001:10001" in DOCKERFILE
    assert 'ENTRYPOINT ["muse"]' in DOCKERFILE, "as a list: muse is process 1 and gets the signals"
    assert "HEALTHCHECK" not in DOCKERFILE
    variables = dict(
        re.findall(r"^    (?:ENV )?([A-Z_]+)=(\S+)", DOCKERFILE[DOCKERFILE.index("ENV PATH") :], re.MULTILINE)
    )
    written = {"HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME"}
    assert {name: Path(variables[name]).parts[1] for name in written} == dict.fromkeys(written, "runs") | {
        "HF_HOME": "data"
    }
    assert variables["USER"]


@pytest.mark.parametrize("service", ["train", "tensorboard"])
def test_services_have_no_more_rights_than_they_need(service: str) -> None:
    settings = COMPOSE["services"][service]
    assert settings["read_only"] is settings["init"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in settings
    assert ON_GPUS["services"][service]["image"] == "${IMAGE:-muse-lightning}"


def test_tensorboard_is_published_on_this_machine_alone() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:6006:6006"]
    assert "./runs:/runs:ro" in COMPOSE["services"]["tensorboard"]["volumes"]


def test_what_compose_starts_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        word.replace("${RECIPE:-recipe:demo}", "recipe:demo") for word in COMPOSE["services"]["train"]["command"]
    ]
    assert "--resume" in command
    assert main([*command, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    volumes = {entry.split(":")[1] for entry in COMPOSE["services"]["train"]["volumes"]}
    assert {f"/{Path(config['run']['root']).parts[0]}", f"/{Path(config['data']['dataset']).parts[0]}"} <= volumes


def test_the_budget_of_an_image_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = [{"created_by": "/bin/sh -c #(nop) COPY a b"}, {"created_by": "ENV", "empty_layer": True}]
    (tmp_path / "config").write_text(json.dumps({"history": [*history, {"created_by": "/bin/sh -c make"}]}))
    manifest = {"config": {"digest": "sha256:config"}, "layers": [{"size": 1_500_000}, {"size": 500_000}]}
    (tmp_path / "manifest").write_text(json.dumps(manifest))
    assert layers.main([str(tmp_path), "manifest", "--budget_gb", "0.002"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| `COPY a b` | 1.5 |", "| `make` | 0.5 |", "| all | 2.0 |"]
    assert layers.main([str(tmp_path), "manifest", "--budget_gb", "0.0019"]) == 1


def test_layers_without_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="1 steps in the history that made a layer, 0 layers"):
        layers.layers({"layers": []}, {"history": [{"created_by": "make"}]})
