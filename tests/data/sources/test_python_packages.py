"""The standard library and installed packages."""

import sys
import sysconfig

import pytest

from muse_lightning.data.documents import ReadLimits
from muse_lightning.data.sources import PythonPackages
from muse_lightning.errors import UserError
from tests.data.sources.builders import LIMITS, contents, write

METADATA = b"Metadata-Version: 2.4\nName: numpy\nVersion: 2.0\nLicense-Expression: BSD-3-Clause\n"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A standard library and a site-packages folder of our own, so that a test does not depend on the machine."""
    library, installed = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for path in ("lib/json/encoder.py", "lib/abc.py", "lib/types.py"):
        write(tmp_path / path)
    for path in ("six.py", "_hidden.pyi", "numpy/core/a.py", "numpy/__pycache__/a.py", "numpy/README.md"):
        write(installed / path)
    write(installed / "numpy-2.0.dist-info" / "METADATA", METADATA)
    write(installed / "numpy-2.0.dist-info" / "licenses" / "LICENSE", b"licence\n")
    record = b"numpy/core/a.py,,\nsix.py,,\nnumpy-2.0.dist-info/METADATA,,\n"
    write(installed / "numpy-2.0.dist-info" / "RECORD", record)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library if name == "stdlib" else installed))
    return tmp_path


def names_and_paths(source):
    return {name: list(files) for name, files in contents(source).items()}


def test_packages_are_repositories(packages):
    prefix = sys.implementation.name
    assert names_and_paths(PythonPackages()) == {
        f"{prefix}/json": ["encoder.py"],
        f"{prefix}/modules": ["abc.py", "types.py"],
        "_hidden": ["_hidden.pyi"],
        "numpy": ["core/a.py"],
        "six": ["six.py"],
    }
    assert set(contents(PythonPackages(installed=False))) == {f"{prefix}/json", f"{prefix}/modules"}
    assert set(contents(PythonPackages(standard_library=False))) == {"_hidden", "numpy", "six"}


def test_version_and_licence_come_from_the_metadata_beside_a_package(packages):
    found = {r.name: (r.revision, r.licence) for unit in PythonPackages().units() for r in unit.read(LIMITS)}
    assert found["numpy"] == found["six"] == ("2.0", "BSD-3-Clause")
    assert found["_hidden"] == ("", None)
    assert found[f"{sys.implementation.name}/json"][1] == "PSF-2.0"


def test_licence_files_of_the_metadata_are_given_for_the_licence_only(packages):
    (unit,) = [unit for unit in PythonPackages().units() if unit.name == "numpy"]
    (repository,) = unit.read(LIMITS)
    given = [file.path for file in repository.files if file.for_licence]
    assert given == ["numpy-2.0.dist-info/METADATA", "numpy-2.0.dist-info/licenses/LICENSE"]


def test_packages_on_this_machine():
    found = {unit.name: unit for unit in PythonPackages().units()}
    (library,) = found[f"{sys.implementation.name}/json"].read(ReadLimits())
    assert "decoder.py" in [file.path for file in library.files]
    (torch,) = found["torch"].read(ReadLimits())
    assert next(file.path for file in torch.files if not file.for_licence) == "_C/__init__.pyi"
    assert torch.licence is not None
    assert len(found) > 50


def test_one_part_is_needed():
    with pytest.raises(UserError, match="set one of them to true"):
        PythonPackages(standard_library=False, installed=False)
