"""A flag's values are taken out wherever it stands, and nothing else is."""

import pytest

from muse_lightning.configuration.taken_flags import take_flag
from muse_lightning.errors import UserError


@pytest.mark.parametrize(
    ("line", "values", "rest"),
    [
        ("--a b", [], "--a b"),
        ("--flag=x=1 --a", ["x=1"], "--a"),
        ("--a --flag x b --flag=y", ["x", "y"], "--a b"),
        ("--flag --a b", ["--a"], "b"),
        ("--flags=x flag=y -flag", [], "--flags=x flag=y -flag"),
    ],
)
def test_taken(line: str, values: list[str], rest: str) -> None:
    assert take_flag("--flag", line.split(), "a name must follow") == (values, rest.split())


@pytest.mark.parametrize("args", [["--flag"], ["--flag="], ["--a", "--flag", ""]])
def test_without_a_value(args: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--flag: a name must follow$"):
        take_flag("--flag", args, "a name must follow")
