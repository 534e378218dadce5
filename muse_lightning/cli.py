"""`muse`: the table of verbs and the exit codes. Neither torch nor Lightning is imported before a verb needs it."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module

from muse_lightning import __version__
from muse_lightning.errors import (
    ExitCode,
    NumericsError,
    RetryError,
    StorageError,
    UserError,
    find_cause,
    one_line,
    shown_url,
    suggestion,
    too_long_path,
)

TRACEBACK_VARIABLE = "MUSE_TRACEBACK"


@dataclass(frozen=True)
class Verb:
    """A command of `muse`.

    `function` is the path of a function `(verb, description, args, allowed) -> None`, imported when the verb is used;
    `args` is the command line after the verb, `allowed` the modules of --allow_module.
    """

    description: str
    function: str


VERBS = {
    "fit": Verb("train a model", "muse_lightning.commands.run_trainer"),
    "validate": Verb("evaluate a checkpoint on the validation documents", "muse_lightning.commands.run_trainer"),
    "test": Verb("evaluate a checkpoint on the held-out test documents", "muse_lightning.commands.run_trainer"),
    "predict": Verb("write the log-likelihood of every token", "muse_lightning.commands.run_trainer"),
    "prepare": Verb("build the dataset of a recipe", "muse_lightning.commands.prepare"),
    "data inspect": Verb("decode blocks of a prepared dataset", "muse_lightning.function_commands.run_function"),
    "data audit": Verb("what a run has read: coverage, repeats, gaps", "muse_lightning.function_commands.run_function"),
    "tokenizer train": Verb("train a byte-level BPE tokenizer", "muse_lightning.function_commands.run_function"),
    "import": Verb("bring a model from Hugging Face's format", "muse_lightning.function_commands.run_function"),
    "export": Verb("write a model in Hugging Face's format", "muse_lightning.function_commands.run_function"),
    "bench attention": Verb(
        "check MuSe attention, then time it beside others", "muse_lightning.function_commands.run_function"
    ),
    "bench data": Verb("time the loader alone", "muse_lightning.function_commands.run_function"),
    "bench prepare": Verb(
        "time the preparation of data beside the tokenizer alone", "muse_lightning.function_commands.run_function"
    ),
    "generate": Verb("continue a prompt with text from a model", "muse_lightning.function_commands.run_function"),
    "bench training": Verb("time a recipe beside its dense twin", "muse_lightning.speed.training_bench.bench_training"),
    "profile": Verb("where the time of a recipe's training step goes", "muse_lightning.speed.profile.profile_recipe"),
    "compare": Verb("evaluate a model under other attention", "muse_lightning.function_commands.run_function"),
    "reproduce": Verb("train a run again and compare the losses", "muse_lightning.reproduce.command.reproduce"),
    "info": Verb("versions, devices and kernels; with --config, what a recipe takes", "muse_lightning.commands.info"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run `muse` and return its exit code (`ExitCode`).

    Args:
        args: the command line; None: this process's, which ends then: signals that ask a training to save or to stop
            are ignored once that has ended.
    """
    with nullcontext() if args is None else _same_handlers_afterwards():
        return _exit_code_of(sys.argv[1:] if args is None else list(args))


@contextmanager
def _same_handlers_afterwards() -> Iterator[None]:
    """Put back the handlers of signals for who goes on after a command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            # Only what has changed: of a handler that is not Python's, such as faulthandler's, Python does not know.
            if signal.getsignal(number) != handler:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _exit_code_of(args: list[str]) -> int:
    try:
        return run(args)
    except UserError as error:
        return _refuse(error)
    except RetryError as reason:
        _print_line(str(reason))
        return ExitCode.RETRY
    except NumericsError as error:
        _print_line(f"error: {error}")
        return ExitCode.NUMERICS
    except StorageError as error:
        _print_line(f"error: {error}")
        return ExitCode.STORAGE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except SystemExit as stop:
        if find_cause(stop, KeyboardInterrupt):  # Lightning ends an interrupted run with exit code 1.
            return ExitCode.INTERRUPTED
        return stop.code if isinstance(stop.code, int) else ExitCode.DONE if stop.code is None else ExitCode.BUG
    except BrokenPipeError:
        # The reader of `muse ... | head` has gone: nobody is left to tell. Python would try to flush once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except Exception as error:
        if find_cause(error, KeyboardInterrupt):
            return ExitCode.INTERRUPTED
        mistake = too_long_path(error)
        if mistake is not None:
            return _refuse(mistake)
        _print_traceback()
        return ExitCode.BUG


def run(args: list[str]) -> int:
    """Find the verb and call its function.

    Raises:
        UserError: there is no such verb, or its arguments are wrong.
    """
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return ExitCode.DONE
    if args[0] == "--version":
        print(f"muse-lightning {__version__}")
        return ExitCode.DONE
    name, rest = split_verb(args)
    verb = VERBS[name]

    from muse_lightning.configuration.allow_list import only_allowed_modules
    from muse_lightning.configuration.taken_flags import take_flag
    from muse_lightning.libraries import import_lightning, importing, quiet_libraries

    allowed, rest = take_flag("--allow_module", rest, "a module name must follow, such as my_project.attention")
    with only_allowed_modules(allowed, rest), quiet_libraries():
        module, _, attribute = verb.function.rpartition(".")
        with importing():
            import_lightning()
            function: Callable[[str, str, Sequence[str], Sequence[str]], None] = getattr(
                import_module(module), attribute
            )
        function(name, verb.description, rest, allowed)
    return ExitCode.DONE


def overview() -> str:
    """The text of `muse --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.description}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: muse VERB [--config FILE|recipe:NAME ...] [--KEY=VALUE ...]",
            "",
            "Pretraining on long contexts with Multipole Semantic Attention.",
            "",
            *lines,
            "",
            "muse VERB --help lists every key of a verb; muse --version prints the version.",
        ]
    )


def split_verb(args: Sequence[str]) -> tuple[str, list[str]]:
    """The verb that a command line begins with, one word or two, and the rest.

    Raises:
        UserError: it begins with none.
    """
    for length in (2, 1):
        name = " ".join(args[:length])
        if name in VERBS:
            return name, list(args[length:])
    family = [name for name in VERBS if name.startswith(f"{args[0]} ")]
    if family:
        raise UserError(f"muse {args[0]}: a second word must follow; accepted: {', '.join(family)}")
    raise UserError(f"muse: no verb {args[0]!r}{suggestion(args[0], VERBS)}; muse --help lists all")


def _refuse(mistake: UserError) -> ExitCode:
    """Report a user's mistake, while its error is handled."""
    if os.environ.get(TRACEBACK_VARIABLE):
        _print_traceback()
    _print_line(f"error: {mistake}")
    return ExitCode.USER_ERROR


def _print_traceback() -> None:
    sys.stderr.write(shown_url(traceback.format_exc()))


def _print_line(text: str) -> None:
    # In one piece: ranks share a terminal.
    sys.stderr.write(f"{_rank_prefix()}{one_line(text)}\n")


def _rank_prefix() -> str:
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or "0"
    return "" if rank == "0" else f"rank {rank}: "


if __name__ == "__main__":
    sys.exit(main())
