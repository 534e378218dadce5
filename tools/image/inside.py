"""What tools/image_check.sh asks of an image from inside: a compiler, kernels, losses of two runs.

Usage: python inside.py extension | read-only | bytecode | losses RUNS OTHER_RUNS
"""

import getpass
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

EXTENSION = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "extension", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_extension(void) {
    PyObject *made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "answer", 42);
    return made;
}
"""


def extension() -> str:
    """Compile and import a module against Python.h, by both compilers, in the folder for temporary files."""
    answers = []
    for compiler, suffix in (("gcc", "c"), ("g++", "cpp")):
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, f"extension.{suffix}"), Path(folder, "extension.so")
            source.write_text(EXTENSION)
            command = [compiler, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", source, "-o", library]
            subprocess.run(command, check=True)
            spec = importlib.util.spec_from_file_location("extension", library)
            assert spec is not None
            answers.append(importlib.util.module_from_spec(spec).answer)
    assert answers == [42, 42], answers
    return f"gcc and g++ compile against Python {sys.version.split()[0]}, in {tempfile.gettempdir()}"


def read_only() -> str:
    """Nothing can be written but on the volumes; the user has no name, and packages ask for one."""
    for folder in ("/", "/tmp", "/opt/muse", "/usr/lib", "/etc", "/home"):
        try:
            Path(folder, "written").write_text("")
        except OSError:
            continue
        raise AssertionError(f"{folder} can be written to")
    for folder in ("/data", "/runs"):
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    return f"only the volumes can be written to; {getpass.getuser()}"


def bytecode() -> str:
    """All modules are compiled, and carry no time: they are neither compared with their sources nor of their build."""
    compiled = [path for folder in (sys.prefix, sysconfig.get_path("stdlib")) for path in Path(folder).rglob("*.pyc")]
    # PEP 552: bit 0 a hash instead of a time, bit 1 to be checked.
    timed = [path for path in compiled if path.read_bytes()[4:8] != b"\x01\0\0\0"]
    assert not timed, f"{len(timed)} modules have a time, as {timed[0]}"
    assert len(compiled) > 5000, len(compiled)
    return f"{len(compiled)} modules compiled"


def losses(stopped: str, whole: str) -> str:
    """The run that was stopped has the losses of the whole one at each step, bit for bit, each step once.

    Of validations it may lack the one that the stop has interrupted (docs/reliability.md, "Resume").
    """
    found, wanted = (scalars(Path(folder)) for folder in (stopped, whole))
    for tag, values in wanted.items():
        same = found[tag] == values if tag.startswith("train/") else found[tag] and set(found[tag]) <= set(values)
        assert same, f"{tag}: {found[tag]}, and {values} of the run that was not stopped"
    steps = found["train/loss"]
    return f"{len(steps)} losses, steps {steps[0][0]} to {steps[-1][0]}, and {len(wanted) - 1} other tags are equal"


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Losses by tag: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.glob("*/version_0")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.endswith(("loss", "bpb", "grad_norm"))]
    assert "train/loss" in tags, tags
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


if __name__ == "__main__":
    checks = {"extension": extension, "read-only": read_only, "bytecode": bytecode, "losses": losses}
    print(checks[sys.argv[1]](*sys.argv[2:]))
