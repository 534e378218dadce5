"""A module of the user's own that is not there, cannot be imported, or lacks what was named: one line about which."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from muse_lightning.attention import AttentionStrategy, Dense
from muse_lightning.configuration.allow_list import only_allowed_modules
from muse_lightning.configuration.imports import NotFoundError, find_object, making, public_path
from muse_lightning.errors import UserError
from tests.recipe import Muse

MODULES = {
    "own_whole": "from torch import nn\nfrom muse_lightning.attention import Dense\n"
    "class Near(Dense): ...\nclass Far(Dense):\n    class Inner(Dense): ...\n"
    "class Layer(nn.Module):\n    def __init__(self, layer_idx: int):\n        super().__init__()\n"
    "def note(*args): ...\n",
    "own_none": "from torch import nn\nclass Layer(nn.Module): ...\n",
    "own_needs": "\nimport no_such_package\n",
    "own_needs_sibling": "import own_sibling\n",
    "own_sibling": "",
    "own_syntax": "\n\nclass A(:\n",
    "own_fails": "\nraise RuntimeError('two\\nlines')\n",
    "odd_import": "import importlib\nimportlib.__import__('')\n",
    "odd_layer": "from torch import nn\nnn.Bilinear(0, 1, 1)\n",
    "own_script": "import sys\nsys.exit(3)\n",
    "own_refuses": "from muse_lightning.attention import Dense; from muse_lightning.data import DocumentSource\n"
    "from lightning.pytorch.callbacks import Callback\n"
    "class Odd(Dense):\n    def __init__(self, layer_idx: int, window: int = 4):\n"
    "        raise ValueError(f'window must be odd, got {window}')\n"
    "class Short(Dense):\n    def __init__(self):\n        super().__init__(0)\n"
    "class Listener(Callback):\n    def __init__(self, every: int = 1):\n        len(every)\n"
    "class Files(DocumentSource):\n    def __init__(self, path: str = 'a'):\n        raise ValueError('no files')\n"
    "    def units(self): ...\n    def identity(self): ...\n"
    "class Unfinished(DocumentSource): ...\n",
}
KNOWN = {"Dense": Dense}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with modules of a user's own."""
    monkeypatch.chdir(tmp_path)
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def line_about(path: str, classes: tuple[type, ...] = (AttentionStrategy,)) -> str:
    allowed = [name for name in MODULES if name != "own_sibling"]
    with only_allowed_modules(allowed), pytest.raises((NotFoundError, UserError)) as error:
        find_object(path, classes, KNOWN)
    return str(error.value)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("own_whole.Naer", "own_whole has no Naer; nearest: Near"),
        ("own_whole.Xyz", "own_whole has no Xyz; accepted: Far, Near"),
        ("own_whole.Far.Iner", "own_whole.Far has no Iner; nearest: Inner"),
        ("own_none.Xyz", "own_none has no Xyz, nor any class derived from muse_lightning.attention.AttentionStrategy"),
        ("own_none.Dens", "own_none has no Dens; nearest: muse_lightning.attention.Dense"),
        (
            "own_hole.Xyz",
            "there is no module own_hole in the working directory or among the installed packages; "
            "nearest: own_whole, own_none",
        ),
        ("own_whole.Xyz.Abc", "there is no module own_whole.Xyz"),
        (
            "muse_lightning.atention.Xyz",
            "there is no module muse_lightning.atention; nearest: muse_lightning.attention",
        ),
        ("muse_lightning.Dens", "muse_lightning has no Dens; nearest: muse_lightning.attention.Dense"),
        (
            "muse_lightning.atention.Dense",
            "there is no module muse_lightning.atention; nearest: muse_lightning.attention.Dense",
        ),
    ],
)
def test_what_is_not_there(own: Path, path: str, line: str) -> None:
    assert line_about(path) == line


def test_a_function_that_is_not_there(own: Path) -> None:
    assert line_about("own_whole.nte", ()) == "own_whole has no nte; nearest: note"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("own_needs", "ModuleNotFoundError: No module named 'no_such_package' ({folder}/own_needs.py, line 2)"),
        (
            "own_needs_sibling",
            "ModuleNotFoundError: No module named 'own_sibling' ({folder}/own_needs_sibling.py, line 1); own_sibling "
            "lies in the working directory: to trust it as well, add --allow_module own_sibling",
        ),
        ("own_syntax", "{folder}/own_syntax.py, line 3: SyntaxError: invalid syntax"),
        ("own_fails", "RuntimeError: two lines ({folder}/own_fails.py, line 2)"),
        ("odd_import", "ValueError: Empty module name ({folder}/odd_import.py, line 2)"),
        ("own_script", "SystemExit: 3 ({folder}/own_script.py, line 2)"),
    ],
)
def test_what_cannot_be_imported(own: Path, module: str, line: str) -> None:
    assert line_about(f"{module}.A") == f"{module} cannot be imported: {line.format(folder=own)}"
    assert "own_sibling" not in sys.modules


def test_the_line_is_the_users_own_where_a_library_refuses(own: Path) -> None:
    assert line_about("odd_layer.A").endswith(f" ({own}/odd_layer.py, line 2)")


def test_what_is_there(own: Path) -> None:
    with only_allowed_modules(["own_whole"]):
        for name in ("Near", "Far.Inner", "Layer", "note"):
            found = find_object(f"own_whole.{name}", (AttentionStrategy,), KNOWN)
            assert found.__qualname__ == name


def test_the_path_to_derive_from() -> None:
    assert AttentionStrategy.__module__ == "muse_lightning.attention.base"
    assert public_path(AttentionStrategy) == "muse_lightning.attention.AttentionStrategy"
    assert public_path(NotFoundError) == "muse_lightning.configuration.imports.NotFoundError"


def test_an_error_that_is_no_refusal_keeps_its_traceback() -> None:
    class Broken:
        def __init__(self) -> None:
            raise KeyError("a")

    with pytest.raises(KeyError):
        making("model.attention")(Broken)


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        (
            "--model.attention=own_whole.Layer",
            "model.attention: own_whole.Layer is no AttentionStrategy; derive it from "
            "muse_lightning.attention.AttentionStrategy (command line)",
        ),
        ("--model.attention=own_whole.Naer", "model.attention: own_whole has no Naer; nearest: Near (command line)"),
        (
            "--model.attention=own_syntax.A",
            "model.attention: own_syntax cannot be imported: {folder}/own_syntax.py, line 3: SyntaxError: invalid "
            "syntax (command line)",
        ),
        (
            "--trainer.callbacks=own_needs.A",
            "trainer.callbacks: own_needs cannot be imported: ModuleNotFoundError: No module named 'no_such_package' "
            "({folder}/own_needs.py, line 2) (command line)",
        ),
        (
            "--data.sources=[own_whole.Near]",
            "data.sources[0]: own_whole.Near is no DocumentSource; derive it from muse_lightning.data.DocumentSource "
            "(command line)",
        ),
        (
            "--data.sources=[own_refuses.Unfinished]",
            "data.sources[0]: own_refuses.Unfinished has no identity() and units(), which every DocumentSource needs "
            "(command line)",
        ),
        (
            "--model.attention={class_path: own_refuses.Odd, init_args: {}}",
            "model.attention: own_refuses.Odd cannot be made: ValueError: window must be odd, got 4 "
            "({folder}/own_refuses.py, line 5)",
        ),
        (
            "--model.attention={class_path: own_refuses.Short, init_args: {}}",
            "model.attention: own_refuses.Short cannot be made: TypeError: Short.__init__() takes 1 positional "
            "argument but 2 were given",
        ),
        (
            "--trainer.callbacks=[own_refuses.Listener]",
            "trainer.callbacks[0]: own_refuses.Listener cannot be made: TypeError: object of type 'int' has no len() "
            "({folder}/own_refuses.py, line 11)",
        ),
        (
            "--trainer.callbacks=[{class_path: LambdaCallback, init_args: {on_fit_start: own_whole.nte}}]",
            "trainer.callbacks[0].init_args.on_fit_start: own_whole has no nte; nearest: note (command line)",
        ),
    ],
)
def test_a_command(muse: Muse, own: Path, flag: str, line: str) -> None:
    allowed = [f"--allow_module={name}" for name in MODULES]
    assert muse.error("fit", "--config=recipe.yaml", flag, *allowed) == line.format(folder=own)


def test_a_class_of_two_keys(muse: Muse, own: Path) -> None:
    flags = ["--trainer.callbacks=[own_refuses.Listener, own_refuses.Listener]", "--allow_module=own_refuses"]
    line = muse.error("fit", "--config=recipe.yaml", *flags)
    assert line.startswith("trainer.callbacks[0], trainer.callbacks[1]: own_refuses.Listener cannot be made: ")


def test_a_model_alone(muse: Muse, own: Path) -> None:
    flags = ["--model.attention={class_path: own_refuses.Odd, init_args: {}}", "--allow_module=own_refuses"]
    line = muse.error("info", "--config=recipe.yaml", *flags)
    assert line.startswith("model.attention: own_refuses.Odd cannot be made: ValueError: window must be odd, got 4 ")


def test_a_verb_that_is_a_function(muse: Muse, own: Path) -> None:
    flags = ["--sources=[own_refuses.Files]", "--output=tokenizer.json", "--allow_module=own_refuses"]
    line = muse.error("tokenizer", "train", *flags)
    assert line == f"sources[0]: own_refuses.Files cannot be made: ValueError: no files ({own}/own_refuses.py, line 14)"
