"""The verbs of `muse` that are one function each: their flags are its parameters, their help its docstring."""

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

# A class is known by its bare name once it has been imported.
import muse_lightning.data.sources  # noqa: F401
from muse_lightning.configuration.check import ConfigCheck, explain
from muse_lightning.configuration.layers import read_layers
from muse_lightning.data.inspection import inspect
from muse_lightning.data.tokenizer_training import train_tokenizer
from muse_lightning.errors import UserError

FUNCTIONS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "data inspect": (inspect, ("dataset",)),
    "tokenizer train": (train_tokenizer, ()),
}
"""Verb -> its function, and the parameters that are given without a flag."""


def run_function(verb: str, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """Parse a verb's flags and call its function.

    Raises:
        UserError: a mistake in the flags, or what the function says.
    """
    function, positional = FUNCTIONS[verb]
    parser = ArgumentParser(prog=f"muse {verb}", description=description, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with these keys; may be repeated.")
    parser.add_function_arguments(function, as_positional=bool(positional))
    check = ConfigCheck(parser, {}, allowed)
    if not {"-h", "--help"} & set(args):
        for layer in read_layers(args, positional):
            check.add(layer)
    try:
        config = parser.parse_args(args)
    except ArgumentError as error:
        raise UserError(explain(error, check)) from error
    values: dict[str, Any] = parser.instantiate(config).as_dict()
    values.pop("config", None)
    function(**values)
