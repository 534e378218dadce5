"""What `muse info` says."""

import subprocess
from pathlib import Path

import pytest
import torch

from muse_lightning.measure import info


def test_environment_names_versions_and_devices() -> None:
    found = info.environment()
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["packages"]) >= {"torch", "lightning", "triton", "litdata"}
    assert len(found["devices"]) >= 1


def test_git_revision_is_of_the_project_alone(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert info.git_revision(package) is None
    git("init", "-q")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-q", "-m", "other")
    # Installed inside a repository that knows nothing of it.
    assert info.git_revision(package) is None
    git("add", "package")
    git("commit", "-q", "-m", "package")
    assert info.git_revision(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("1")
    assert info.git_revision(package) == git("rev-parse", "HEAD") + "-dirty"


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert info.git_revision(Path(info.__file__).parent) is None


def test_report_of_the_machine() -> None:
    report = info.machine_report()
    assert f"torch {info.environment()['packages']['torch']}" in report
    assert "attention kernel, exact: " in report
    assert "device 0: " in report


@pytest.mark.parametrize(
    ("has_gpu", "has_triton", "kernel"),
    [(False, True, "plain PyTorch (reference)"), (True, False, "plain PyTorch (reference)"), (True, True, "Triton ")],
)
def test_the_kernels_of_muse_are_those_of_auto(
    has_gpu: bool, has_triton: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(info, "HAS_TRITON", has_triton)
    assert info.attention_kernels()["muse"].startswith(kernel)
