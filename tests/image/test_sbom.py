"""tools/image/sbom.py: what the locks name is what the image has, once each, and Debian's packages come on top."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.image import sbom

STATUS = """\
Package: attr
Status: install ok installed
Architecture: amd64
Version: 1:2.4.47-2+b1
Description: one line
 Version: not a field

Package: removed
Status: deinstall ok config-files
Architecture: all
Version: 1
"""


def component(name: str, reference: str) -> dict[str, str]:
    return {"bom-ref": reference, "name": name, "purl": f"pkg:pypi/{name}@2.0", "type": "library", "version": "2.0"}


@pytest.fixture
def bom(tmp_path: Path) -> Path:
    """Of two locks that both name `anyio`."""
    components = [component("anyio", "line-1"), component("typing-extensions", "line-2"), component("anyio", "line-3")]
    content: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "metadata": {"component": {"bom-ref": "root", "name": "muse-lightning", "type": "application"}},
        "components": components,
        "dependencies": [{"ref": reference} for reference in ("root", "line-1", "line-2", "line-3")],
    }
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image's file system, as far as packages go."""
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('PRETTY_NAME="Debian GNU/Linux 12"\nID=debian\nVERSION_ID="12"\n')
    for name, version in {"anyio": "2.0", "typing_extensions": "2.0", "muse_lightning": "0.7"}.items():
        install(tmp_path, name, version)
    return tmp_path


def install(root: Path, name: str, version: str) -> None:
    folder = root / f"opt/muse/lib/python3.11/site-packages/{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")


def test_packages_are_those_of_python_and_of_debian(root: Path, bom: Path) -> None:
    assert sbom.main([str(root), str(bom)]) == 0
    found = json.loads(bom.read_text())
    # The last as the examples of the purl specification have it.
    debian = "pkg:deb/debian/attr@1:2.4.47-2%2Bb1?arch=amd64&distro=debian-12"
    assert [entry["purl"] for entry in found["components"]] == [
        "pkg:pypi/anyio@2.0",
        "pkg:pypi/typing-extensions@2.0",
        debian,
    ]
    assert found["metadata"]["component"]["version"] == "0.7"
    references = {entry["bom-ref"] for entry in [found["metadata"]["component"], *found["components"]]}
    assert {entry["ref"] for entry in found["dependencies"]} == references - {debian}


@pytest.mark.parametrize("version", ["1.9", "2.0"], ids=["another version", "not in a lock"])
def test_an_image_that_is_not_of_its_locks_is_refused(
    root: Path, bom: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bom.read_text()
    name = "left_over"
    if version != "2.0":
        name = "anyio"
        (folder,) = root.glob("opt/muse/lib/python3.11/site-packages/anyio-*")
        (folder / "METADATA").unlink()
        folder.rmdir()
    install(root, name, version)
    assert sbom.main([str(root), str(bom)]) == 1
    assert f"{name.replace('_', '-')} {version}" in capsys.readouterr().err
    assert bom.read_text() == before
