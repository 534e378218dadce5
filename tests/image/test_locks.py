"""requirements/: the locks have the versions of constraints.txt, hashes for all, and all that is declared."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
TARGETS = ["cpu", "cu130"]
EXTRAS = ["hf", "pypi", "tables"]
LEFT_OUT = {"cpu": {"torchvision", "triton"}, "cu130": {"torchvision"}}
"""litdata needs torchvision for images only; without a GPU no Triton kernel runs."""


def normalized(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [line.removesuffix(" \\").split("==") for line in lines if re.match(r"\w", line)]
    return {normalized(name): version for name, version in entries}


def declared(lock: str) -> set[str]:
    """What pyproject.toml asks for by a lock's name."""
    requirements = {
        **dict.fromkeys(TARGETS, PROJECT["project"]["dependencies"]),
        **{extra: PROJECT["project"]["optional-dependencies"][extra] for extra in EXTRAS},
        "build": PROJECT["build-system"]["requires"],
    }[lock]
    return {normalized(entry) for entry in requirements}


def test_the_locks_are_those_of_targets_extras_and_the_build() -> None:
    assert {path.stem for path in LOCKS} == {*TARGETS, *EXTRAS, "build"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_versions_are_those_of_constraints(lock: Path) -> None:
    tested = pins(ROOT / "constraints.txt")
    locked = pins(lock)
    # torch pins CUDA's libraries itself.
    of_cuda = {name for name in locked if re.match(r"(nvidia|cuda)-", name)}
    assert bool(of_cuda) == (lock.stem == "cu130")
    assert {name: version.removesuffix("+cpu") for name, version in locked.items() if name not in of_cuda} == {
        name: tested.get(name) for name in locked if name not in of_cuda
    }
    assert locked.get("torch", "+cpu").endswith("+cpu") == (lock.stem != "cu130")


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_all_that_is_declared_is_locked(lock: Path) -> None:
    assert declared(lock.stem) - set(pins(lock)) == LEFT_OUT.get(lock.stem, set()) - {"torchvision"}
    assert not set(pins(lock)) & LEFT_OUT.get(lock.stem, set())


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_every_file_is_named_by_its_hash_and_by_no_address(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    entries = re.findall(r"^\w.*(?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+$", text, flags=re.MULTILINE)
    assert len(entries) == len(pins(lock)) > 1
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == sum(entry.count("\n") + 1 for entry in entries), "nothing but packages and hashes"
    assert "://" not in text
