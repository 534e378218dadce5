"""Which Python modules a configuration may name: a class path in a YAML file or a flag is code that would run."""

import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from muse_lightning.errors import UserError
from muse_lightning.safe_path import safe_path

ALLOWED_MODULES = ("torch", "lightning", "litdata", "muse_lightning")


class WorkingDirectoryFinder(MetaPathFinder):
    """Finds the modules named by `--allow_module` in the working directory, and no others."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.top_level = {name.partition(".")[0] for name in names}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an allowed top-level module; submodules are found by their package."""
        if path is not None or fullname not in self.top_level:
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, [str(self.folder)], target)


def check_names(names: Sequence[str]) -> None:
    """Refuse values of `--allow_module` that are no module names.

    Raises:
        UserError: a name is not a dotted Python name, or is one that could change the allow-list itself.
    """
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"--allow_module: {name!r} is not a module name; expected for example my_project.attention")
        if name.partition(".")[0] == "jsonargparse":
            raise UserError(f"--allow_module: {name!r} cannot be allowed: it decides itself what is allowed")


def is_allowed(name: str, extra: Sequence[str]) -> bool:
    """Whether the dotted path `name` lies in an allowed module."""
    return any(name == module or name.startswith(module + ".") for module in (*ALLOWED_MODULES, *extra))


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether a command line may print what keys mean: --help, --KEY.help or --print_config=comments."""
    return any("help" in arg or "comments" in arg or arg.startswith("-h") for arg in args)


@contextmanager
def only_allowed_modules(extra: Sequence[str], args: Sequence[str] = ("--help",)) -> Iterator[None]:
    """Inside, jsonargparse imports nothing outside the allowed modules, and the working directory is not importable.

    The directory this package itself is loaded from stays importable: worker processes of an editable install need it.

    Args:
        extra: Module names of `--allow_module`; these are also looked for in the working directory.
        args: the command line. What every field means is read from the sources only for one that asks for help: that is
            a third of the CPU time from a recipe's flags to its trainer.
    """
    from jsonargparse import set_parsing_settings

    check_names(extra)
    working_directory = Path.cwd()
    own_folder = Path(__file__).resolve().parents[2]
    path_before = list(sys.path)
    finder = WorkingDirectoryFinder(working_directory, extra)
    sys.path[:] = [entry for entry in sys.path if not _is_same_folder(entry, working_directory, own_folder)]
    sys.meta_path.insert(0, finder)
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED_MODULES, *extra],
        # A class_path where any value is accepted stays a plain dictionary: nothing is built from it.
        instantiate_subclass_spec_in_any=False,
        # A configuration is read from local files only, never from an address.
        config_read_mode_fsspec_enabled=False,
        # The help of a dataclass's field is the text under it.
        docstring_parse_attribute_docstrings=asks_for_help(args),
    )
    try:
        with safe_path():
            yield
    finally:
        sys.meta_path.remove(finder)
        sys.path[:] = path_before
        withdrawn = [name for name in extra if not is_allowed(name, ())]
        set_parsing_settings(import_path_denylist=["*", *withdrawn])


def _is_same_folder(entry: str, working_directory: Path, own_folder: Path) -> bool:
    folder = Path(entry or os.curdir).resolve()
    return folder == working_directory.resolve() and folder != own_folder
