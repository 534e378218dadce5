"""What is installed: the contents of the wheel, the declared dependencies, and an installation from each form."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import muse_lightning

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normalized(requirement: str) -> str:
    """The distribution's name in a requirement, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def build(target: str, source: Path, folder: Path) -> Path:
    """Build `target`, wheel or sdist, of the project in `source`."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, check=True, cwd=source, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built sdist."""
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def test_the_wheel_holds_both_packages_recipes_presets_and_the_licence(wheel: Path) -> None:
    expected = {
        f"{target}/{path.relative_to(folder).as_posix()}"
        for folder, target, patterns in [
            (ROOT / "muse_lightning", "muse_lightning", ["*.py", "*.yaml"]),
            (ROOT / "kernels" / "muse_kernels", "muse_kernels", ["*.py"]),
            (ROOT / "recipes", "muse_lightning/recipes", ["*.yaml", "*.md"]),
        ]
        for pattern in patterns
        for path in folder.rglob(pattern)
    }
    info = f"muse_lightning-{muse_lightning.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.startswith(info)}
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"muse = muse_lightning.cli:main" in archive.read(f"{info}/entry_points.txt")
    assert packed == expected
    assert {"muse_lightning/recipes/demo.yaml", "muse_lightning/model/presets/demo.yaml"} <= packed


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert source.name == f"muse_lightning-{muse_lightning.__version__}"
    rebuilt = build("wheel", source, tmp_path / "rebuilt")
    assert rebuilt.name == wheel.name
    assert rebuilt.read_bytes() == wheel.read_bytes()
    read = ("CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "constraints.txt", "docs/tensorboard.md")
    assert all((source / name).read_bytes() == (ROOT / name).read_bytes() for name in read)
    assert not {"tests", "benchmarks", "tools", ".github"} & {path.name for path in source.iterdir()}


def test_the_version_stands_in_one_place() -> None:
    version = re.escape(muse_lightning.__version__)
    assert PROJECT["dynamic"] == ["version"]
    assert re.search(rf"^## \[.*{version}", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    # Of this project: constraints and actions have versions of theirs.
    named = re.compile(rf"muse[_-]lightning[^\n]{{0,20}}(?<![\d.]){version}(?![\d.])")
    build_files = ["Dockerfile", "Makefile", "README.md", "mkdocs.yml", "pyproject.toml", "SECURITY.md"]
    paths = [*(ROOT / name for name in build_files), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.yml")]
    assert len(paths) > 20
    for path in [*paths, *(ROOT / "muse_lightning").rglob("*.py")]:
        assert not named.search(path.read_text(encoding="utf-8")), path


PEERS = {"fla"}
"""Timed beside this project where somebody has installed them, and needed by nobody (muse_lightning/measure/bench)."""


def test_every_package_that_is_imported_is_a_declared_dependency() -> None:
    imported = set()
    sources = [*(ROOT / "muse_lightning").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported >= PEERS
    imported -= {*sys.stdlib_module_names, "muse_lightning", "muse_kernels", *PEERS}
    distributions = packages_distributions()
    needed = {normalized(distributions[name][0]) for name in imported}
    assert {"torch", "lightning", "litdata"} <= needed, f"read {len(sources)} files"
    optional = [
        entry for extra, entries in PROJECT["optional-dependencies"].items() if extra != "dev" for entry in entries
    ]
    assert needed <= {normalized(entry) for entry in [*PROJECT["dependencies"], *optional]}


def test_every_direct_dependency_has_a_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[\d.]+(post\d+)?", version) for version in pins.values()), "an exact public version each"
    extras = [entry for entries in PROJECT["optional-dependencies"].values() for entry in entries]
    direct = {normalized(entry) for entry in [*PROJECT["dependencies"], *extras]}
    assert direct <= {normalized(name) for name in pins}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["wheel", "folder", "editable"])
def test_each_form_of_installation_works(form: str, wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own that borrows this one's dependencies, run from a folder without the sources."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # Listed in a .pth file, this environment's own .pth files are not followed: its copy of the project stays hidden.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")

    source = {"wheel": [str(wheel)], "folder": [str(ROOT)], "editable": ["--editable", str(ROOT)]}[form]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--force-reinstall",
        *source,
    )
    lines = run(
        python, "-c", "import muse_lightning as a, muse_kernels as b; print(a.__path__[0], b.__path__[0], sep='\\n')"
    )
    homes = [Path(line).parent for line in lines.splitlines()]
    assert homes == ([ROOT, ROOT / "kernels"] if form == "editable" else [site, site])
    muse = python.with_name("muse")
    assert muse_lightning.__version__ in run(muse, "--version")
    if form != "wheel":
        assert "hidden_size" in run(muse, "fit", "--config", "recipe:demo", "--print_config")
    else:
        # The borrowed packages are none of this environment's: one of the few left may be all of the overlay's 0.4 MB.
        run(muse, "fit", "--config", "recipe:demo", "--config", "recipe:overlays/smoke", "--data.max_bytes=4000000")
        assert (tmp_path / "runs/smoke/version_0/checkpoints/step=2.ckpt").is_file()
