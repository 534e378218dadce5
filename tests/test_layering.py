"""Who may import whom, read from the sources: a higher row of the table never imports a lower one."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"muse_lightning": ROOT / "muse_lightning", "muse_kernels": ROOT / "kernels" / "muse_kernels"}

# Each unit (a package or module directly below muse_lightning, or all of muse_kernels) with the units it may import.
# A unit may always import itself; a dotted entry admits that module alone.
OPEN_TO_ALL = {"errors", "files", "safe_path", "bounded_yaml"}
OPERATORS = {"muse_kernels", "collectives"}
TRAINING = {
    "training",
    "checkpoints",
    "model",
    "attention",
    "data",
    "parallelize",
    "offload",
    "measure",
    "pretrained",
    *OPERATORS,
}
CLI = {"cli", "recipe_cli", "run_defaults", "commands", "endings", "function_commands", "configuration", "libraries"}
MAY_IMPORT: dict[str, set[str]] = {
    "muse_kernels": set(),
    "collectives": set(),
    "errors": set(),
    "files": {"errors"},
    "safe_path": set(),
    "bounded_yaml": set(),
    "attention": OPERATORS | OPEN_TO_ALL,
    "model": {"attention.base"} | OPEN_TO_ALL,
    "data": OPEN_TO_ALL,
    "checkpoints": OPEN_TO_ALL,
    "drop_in": {"attention", *OPERATORS} | OPEN_TO_ALL,
    # What a run's data says of its tokenizer.
    "pretrained": {
        "model",
        "attention",
        "checkpoints.choice",
        *(f"data.{module}" for module in ("card", "filesystems", "ledger", "token_bytes", "tokenizer")),
    }
    | OPEN_TO_ALL,
    "tiles": set(),
    "offload": set(),
    "parallelize": {"model", "attention", "tiles", "offload", *OPERATORS} | OPEN_TO_ALL,
    # What a recipe takes depends on what is recomputed.
    "measure": {"parallelize", "model", "attention", "pretrained", *OPERATORS} | OPEN_TO_ALL,
    "training": TRAINING | OPEN_TO_ALL,
    "callbacks": TRAINING | OPEN_TO_ALL,
    "numerics": TRAINING | OPEN_TO_ALL,
    "compare": TRAINING | {"callbacks"} | OPEN_TO_ALL,
    "speed": TRAINING | {"callbacks", "recipe_cli"} | OPEN_TO_ALL,
    "reproduce": TRAINING | {"callbacks", "commands", "recipe_cli", "function_commands", "configuration"} | OPEN_TO_ALL,
    **{unit: CLI | TRAINING | {"callbacks", "numerics", "compare"} | OPEN_TO_ALL for unit in CLI},
}
# Units that must do with the standard library and these.
EXTERNAL: dict[str, set[str]] = {
    "muse_kernels": {"torch", "triton"},
    "collectives": {"torch"},
    "errors": set(),
    "files": set(),
    "safe_path": set(),
    "bounded_yaml": {"yaml"},
    "tiles": {"torch"},
    "offload": {"torch"},
    "cli": set(),
}
# Imports inside functions: the command line starts quickly by them, and a package that need not be there needs them.
LAZY_UNITS = CLI
LAZY_PACKAGES = {"transformers", "triton", "fla", "pyarrow", "unearth", "zstandard"}
NOT_FOR_PACKAGES = {"tests", "benchmarks", "tools", "recipes"}


class Import(NamedTuple):
    """One imported name: `target` is absolute and dotted, for `from a import b` it is "a.b"."""

    target: str
    line: int
    inside_function: bool


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import statement of a source file, those of TYPE_CHECKING blocks and of functions included."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in inside)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, id(node) in inside)


def unit_of(dotted: str) -> str | None:
    """The unit that a dotted name of ours belongs to; None for the bare package, such as muse_lightning.__version__."""
    parts = dotted.split(".")
    if parts[0] == "muse_kernels":
        return "muse_kernels"
    return parts[1] if len(parts) > 1 and parts[1] != "__version__" else None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the imports of one source file break, a line each."""
    unit = unit_of(module)
    if unit is None:
        return [
            f"line {found.line}: {module} imports {found.target}" for found in imports_of(source, module, is_package)
        ]
    if unit not in MAY_IMPORT:
        return [f"{unit} has no row in the table: say what it may import"]
    broken = []
    for target, line, inside_function in imports_of(source, module, is_package):
        root = target.split(".")[0]
        if root in SOURCES:
            other = unit_of(target)
            within = target.removeprefix("muse_lightning.")
            allowed = other in {None, unit} or any(f"{within}.".startswith(f"{entry}.") for entry in MAY_IMPORT[unit])
        else:
            allowed = root not in NOT_FOR_PACKAGES and (
                unit not in EXTERNAL or root in EXTERNAL[unit] or root in sys.stdlib_module_names
            )
        if not allowed:
            broken.append(f"line {line}: {unit} may not import {target}")
        if inside_function and unit not in LAZY_UNITS and root not in LAZY_PACKAGES:
            broken.append(f"line {line}: {target} is imported inside a function")
    return broken


def source_files() -> Iterator[tuple[Path, str, bool]]:
    """Each source file with its dotted module name and whether it is a package's __init__."""
    for root, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (root, *path.relative_to(folder).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            yield path, ".".join(parts[:-1] if is_package else parts), is_package


def test_every_source_file_keeps_to_the_table() -> None:
    files = list(source_files())
    broken = [
        f"{path.relative_to(ROOT)}: {violation}"
        for path, module, is_package in files
        for violation in violations(path.read_text(encoding="utf-8"), module, is_package)
    ]
    assert not broken, "\n".join(broken)
    read = [unit_of(module) for _, module, _ in files]
    # Floors, so that a moved folder cannot leave this test with nothing to read.
    for unit, at_least in {"muse_kernels": 6, "attention": 6, "model": 5, "data": 12, "training": 5, "cli": 1}.items():
        assert read.count(unit) >= at_least, f"{unit}: read {read.count(unit)} files"
    assert len(read) >= 50


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "muse_kernels.attention.op",
            "import torch\nimport triton.language as tl\nfrom muse_kernels.cost import pairs",
        ),
        ("muse_lightning.attention.muse", "import muse_kernels\nfrom muse_lightning.attention.base import Strategy"),
        ("muse_lightning.model.llama", "from muse_lightning.attention.base import AttentionStrategy"),
        ("muse_lightning.model.llama", "from muse_lightning.attention import base"),
        ("muse_lightning.model.llama", "from .rope import apply_rotary"),
        ("muse_lightning.model.hf", "def load():\n    import transformers"),
        ("muse_lightning.data.card", "from muse_lightning import __version__, errors"),
        ("muse_lightning.callbacks.mfu", "from muse_lightning.training.module import LanguageModel"),
        ("muse_lightning.cli", "import os\ndef main():\n    import muse_lightning.commands"),
    ],
)
def test_what_the_table_allows_is_accepted(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize(
    ("module", "source", "named"),
    [
        ("muse_kernels.attention.op", "import numpy", "numpy"),
        ("muse_kernels.attention.op", "from lightning import Trainer", "lightning.Trainer"),
        ("muse_kernels.cost", "import muse_lightning.errors", "muse_lightning.errors"),
        ("muse_lightning.collectives", "import lightning", "lightning"),
        ("muse_lightning.errors", "import muse_lightning.files", "muse_lightning.files"),
        ("muse_lightning.attention.dense", "from muse_lightning.model.llama import Llama", "model.llama.Llama"),
        ("muse_lightning.model.llama", "from muse_lightning.attention import Dense", "attention.Dense"),
        ("muse_lightning.model.llama", "import muse_lightning.attention", "muse_lightning.attention"),
        ("muse_lightning.model.llama", "from muse_lightning.attention.base_case import X", "attention.base_case"),
        ("muse_lightning.model.llama", "from ..data import TokenDataModule", "muse_lightning.data.TokenDataModule"),
        ("muse_lightning.model.llama", "if TYPE_CHECKING:\n    import muse_lightning.training", "training"),
        ("muse_lightning.data.card", "from muse_lightning import model", "muse_lightning.model"),
        ("muse_lightning.measure.flops", "import muse_lightning.data", "muse_lightning.data"),
        ("muse_lightning.parallelize", "import muse_lightning.measure", "muse_lightning.measure"),
        ("muse_lightning.training.module", "import muse_lightning.callbacks", "muse_lightning.callbacks"),
        ("muse_lightning.callbacks.mfu", "import muse_lightning.cli", "muse_lightning.cli"),
        ("muse_lightning.cli", "import torch", "torch"),
        ("muse_lightning.data.card", "from tests.assertions import relative_error", "tests.assertions"),
        ("muse_lightning.data.card", "def read():\n    import torch", "inside a function"),
        ("muse_lightning.data.card", "class A:\n    async def f(self):\n        import json", "inside a function"),
        ("muse_lightning.utils", "", "utils has no row"),
        ("muse_lightning", "import torch", "muse_lightning imports torch"),
    ],
)
def test_what_the_table_forbids_is_found(module: str, source: str, named: str) -> None:
    (violation,) = violations(source, module, is_package=module == "muse_lightning")
    assert named in violation


def test_a_relative_import_in_a_package_starts_at_the_package() -> None:
    assert [found.target for found in imports_of("from .base import A\nfrom . import b", "m.sub", is_package=True)] == [
        "m.sub.base.A",
        "m.sub.b",
    ]


def test_muse_kernels_can_be_imported_with_torch_alone() -> None:
    """With everything else of ours and of our dependencies made unimportable, in a fresh interpreter."""
    blocked = ["muse_lightning", "lightning", "pytorch_lightning", "litdata", "jsonargparse", "tokenizers", "triton"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); import muse_kernels; muse_kernels.muse_attention"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
