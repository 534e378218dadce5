"""The README's commands run, and links in the documentation lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from muse_lightning.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]

NOT_RUN_HERE = {
    "make demo": "continuous integration runs it, shortened",
    "make test": "it runs this test",
    "python3 -m venv": "installs an environment: make demo does the same",
    "pip ": "installs",
    "docker ": "needs a container engine",
    "mkdir -p runs && docker ": "likewise; tools/image_check.sh runs the image without one",
    "tensorboard ": "a server that does not end",
}
"""Beginnings of the commands that no test can run, with the reason."""

SMALL = {
    # Every training command at the size of the smoke overlay.
    "recipes/demo.yaml": "recipes/demo.yaml --config recipes/overlays/smoke.yaml",
    "recipe:demo": "recipe:demo --config recipes/overlays/smoke.yaml",
    "--trainer.max_steps=20": "--trainer.max_steps=2",
    "runs/demo/version_0/checkpoints/step=240.ckpt": "runs/smoke/version_0/checkpoints/step=2.ckpt",
    "runs/demo/version_0": "runs/smoke/version_0",
    "--trainer.max_steps=300": "--trainer.max_steps=3",
    "--data data/demo --seq_len 2048": "--data data/smoke --seq_len 256 --blocks 1",
    "--max_new_tokens 100": "--max_new_tokens 3",
    "--vocab_size=4096": "--vocab_size=300",
    # Little data is prepared sooner than more processes start.
    "--data.dataset=data/mine": "--data.dataset=data/mine --data.prepare_workers=1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_command_is_run_or_has_a_reason_not_to_be() -> None:
    assert len(commands()) > 15
    for command in commands():
        assert command.startswith("muse ") != command.startswith(tuple(NOT_RUN_HERE)), command
    for start in NOT_RUN_HERE:
        assert any(command.startswith(start) for command in commands()), start


def test_the_muse_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for repository in range(6):
        folder = tmp_path / "repositories" / f"repository_{repository}"
        folder.mkdir(parents=True)
        text = "\n".join(f"def function_{i}(x):\n    return x * {i + repository}\n" for i in range(120))
        (folder / "module.py").write_text(text)
    (module,) = blocks("python")
    (tmp_path / "my_attention.py").write_text(module)
    run = [command for command in commands() if command.startswith("muse ")]
    assert len(run) > 8
    for command in run:
        for full, small in SMALL.items():
            command = command.replace(full, small)
        assert main(shlex.split(command)[1:]) == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "attention.md", "data.md", "training.md"} <= {page.name for page in PAGES}
