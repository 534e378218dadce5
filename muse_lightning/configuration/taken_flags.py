"""Flags that no configuration file can say: taken out of the command line before it is parsed."""

from collections.abc import Sequence

from muse_lightning.errors import UserError


def take_flag(flag: str, args: Sequence[str], refusal: str) -> tuple[list[str], list[str]]:
    """The values of a flag that may be repeated, and the command line without it.

    Args:
        flag: with its dashes; its value follows it, or a `=`.
        args: a command line.
        refusal: what to say where no value follows.
    Raises:
        UserError: one has no value.
    """
    values, rest = [], []
    tokens = iter(args)
    for token in tokens:
        name, is_assignment, value = token.partition("=")
        if name != flag:
            rest.append(token)
            continue
        if not is_assignment:
            value = next(tokens, "")
        if not value:
            raise UserError(f"{flag}: {refusal}")
        values.append(value)
    return values, rest
