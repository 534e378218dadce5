"""Workflows of continuous integration: actions pinned by commit, and no permission that a job does not name."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAY_WRITE = {("wheels.yml", "release"): {"contents"}}
"""(workflow, job) -> what it may write to."""


def read(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_the_workflows() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "image", "tests", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
class TestWorkflow:
    def test_actions_are_pinned_by_commit_with_the_version_beside_it(self, path: Path) -> None:
        uses = re.findall(r"^\s*(?:- )?uses: (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len(uses) == sum("uses" in step for step in steps(path)) > 0
        for each in uses:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each), each

    def test_permissions_are_none_but_those_of_a_job(self, path: Path) -> None:
        workflow = read(path)
        assert workflow["permissions"] == {}
        for name, job in workflow["jobs"].items():
            granted = job["permissions"]
            written = {scope for scope, access in granted.items() if access != "read"}
            assert written == MAY_WRITE.get((path.name, name), set()), name
            assert set(granted) <= {"contents"}, name

    def test_jobs_end_and_leave_no_token_in_the_checkout(self, path: Path) -> None:
        assert all(job["timeout-minutes"] <= 120 for job in read(path)["jobs"].values())
        checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
        assert checkouts
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)

    def test_scripts_take_nothing_from_outside(self, path: Path) -> None:
        """An expression would be text that the author of a branch or a title chose; variables are not run."""
        scripts = [step["run"] for step in steps(path) if "run" in step]
        assert scripts
        assert not any("${{" in script for script in scripts)


def test_the_image_is_checked_by_what_its_script_needs() -> None:
    script = (ROOT / "tools" / "image_check.sh").read_text(encoding="utf-8")
    (needed,) = re.findall(r"^# pip install (.*)$", script, flags=re.MULTILINE)
    commands = [step["run"].split() for step in steps(ROOT / ".github" / "workflows" / "image.yml") if "run" in step]
    (installed,) = (words for words in commands if "pip" in words)
    constrained = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    names = [word.partition("==")[0] for word in installed[installed.index("constraints.txt") + 1 :]]
    assert names == needed.split()
    for word in installed[-len(names) :]:
        assert "==" in word or re.search(rf"^{word}==", constrained, flags=re.MULTILINE), f"{word} is not pinned"


def test_an_action_has_one_version() -> None:
    found = {each for path in WORKFLOWS for each in re.findall(r"uses: (\S+@\S+)", path.read_text(encoding="utf-8"))}
    names = [each.partition("@")[0] for each in found]
    assert len(names) == len(set(names)) >= 4
