"""The verbs of `muse` that are one function each: their flags are its parameters, their help its docstring."""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

# A class is known by its bare name once it has been imported.
import muse_lightning.data.sources  # noqa: F401
from muse_lightning.configuration.check import ConfigCheck, parse
from muse_lightning.configuration.layers import read_layers, use_loader
from muse_lightning.errors import UserError, shown_url

# As pathlib leaves it, with one slash.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.:-]+:/", re.IGNORECASE)

FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data inspect": ("muse_lightning.data.inspection.inspect", ("dataset",)),
    "tokenizer train": ("muse_lightning.data.tokenizer_training.train_tokenizer", ()),
    "data audit": ("muse_lightning.data.audit.audit", ("run",)),
    "import": ("muse_lightning.pretrained.import_model.import_model", ("source",)),
    "export": ("muse_lightning.pretrained.export_model.export_model", ("model",)),
    "bench data": ("muse_lightning.data.loading_bench.bench_data", ()),
    "bench prepare": ("muse_lightning.data.preparation_bench.bench_prepare", ()),
    "bench attention": ("muse_lightning.measure.bench.command.bench_attention", ()),
    "generate": ("muse_lightning.pretrained.generate.generate", ()),
    "compare": ("muse_lightning.compare.command.compare", ()),
}
"""Verb -> its function, imported when the verb is used, and the parameters that are given without a flag."""


def run_function(verb: str, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """Parse a verb's flags and call its function.

    Raises:
        UserError: a mistake in the flags, or what the function says.
    """
    path, positional = FUNCTIONS[verb]
    module, _, name = path.rpartition(".")
    function: Callable[..., None] = getattr(import_module(module), name)
    function(**parse_flags(function, positional, verb, description, args, allowed))


def parse_flags(
    function: Callable[..., Any],
    positional: Sequence[str],
    verb: str,
    description: str,
    args: Sequence[str],
    allowed: Sequence[str],
) -> dict[str, Any]:
    """Values of a function's or class's parameters, by name, from a verb's flags.

    Args:
        function: its signature says which flags there are, its docstring their help.
        positional: parameters that are given without a flag.
        verb, description, args, allowed: see `cli.Verb`.
    Raises:
        UserError: a mistake in the flags.
    """
    parser = ArgumentParser(prog=f"muse {verb}", description=description, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with these keys; may be repeated.")
    add = parser.add_class_arguments if isinstance(function, type) else parser.add_function_arguments
    # sub_configs: a source may be the path of a file of its own, so that two recipes share it.
    add(function, as_positional=bool(positional), sub_configs=True)
    use_loader()
    check = ConfigCheck(parser, {}, allowed)
    if not {"-h", "--help"} & set(args):
        for layer in read_layers(args, positional):
            check.add(layer)
    config = parse(parser, args, check)
    try:
        values: dict[str, Any] = parser.instantiate(config, instantiators=check.instantiators()).as_dict()
    except ValueError as error:  # A record of options checks its own values.
        raise UserError(str(error)) from error
    values.pop("config", None)
    for key, value in values.items():
        if isinstance(value, Path) and (address := _ADDRESS.match(str(value))):
            shown = shown_url(f"{address[0]}/{str(value)[address.end() :]}")
            raise UserError(f"{key}: {shown} is an address; expected a path on this machine")
    return values
