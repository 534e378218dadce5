"""YAML that means too much, is nested too deeply or does not fit its tags is one kind of error; all else stays."""

from pathlib import Path

import pytest
import yaml

from muse_lightning.bounded_yaml import MAX_DEPTH, MAX_VALUES, OutOfBounds, check_bounds, load_bounded

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


def laughs(levels: int, repeat: str = "[{}]") -> str:
    """Text in which each level repeats the one before nine times."""
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{level}: &a{level} {repeat.format(', '.join([f'*a{level - 1}'] * 9))}" for level in range(1, levels)]
    return "\n".join(lines)


def test_recipes_are_read_as_pyyaml_reads_them() -> None:
    assert len(RECIPES) > 15
    for path in RECIPES:
        assert load_bounded(path.read_text()) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1),
        "{a: &a [1, 2], b: *a, c: {<<: {d: *a}}}",
    ],
    ids=["depth", "aliases"],
)
def test_within_bounds(text: str) -> None:
    assert load_bounded(text) == yaml.safe_load(text)


def test_as_many_values_as_may_be() -> None:
    check_bounds("[" + "1, " * (MAX_VALUES - 1) + "]")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("&a [*a]", "is a part of itself"),
        ("a: &a {b: [{c: *a}]}", "is a part of itself"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ("- " * 100 + "x", "nested deeper than 64"),
        ("\n".join(f"{' ' * level}a:" for level in range(100)), "nested deeper than 64"),
        (f"a: &a {'[' * 40 + ']' * 40}\nb: {'[' * 40}*a{']' * 40}", "nested deeper than 64"),
        (laughs(8), "more than 100,000 values"),
        (laughs(8, "{{<<: [{}]}}"), "more than 100,000 values"),
        ("[" + "1, " * MAX_VALUES + "1]", "more than 100,000 values"),
    ],
    ids=["itself", "below itself", "flow", "sequences", "mappings", "by an alias", "laughs", "merges", "long"],
)
def test_out_of_bounds(text: str, said: str) -> None:
    with pytest.raises(OutOfBounds, match=said):
        check_bounds(text)
    with pytest.raises(OutOfBounds, match=said):
        load_bounded(text)


@pytest.mark.parametrize("text", ["!!int many", "!!bool many", "!!int ''", "!!float .", "!!timestamp x", "9" * 5000])
def test_tags_that_do_not_fit(text: str) -> None:
    """Each raises something else in PyYAML, and no YAMLError."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        yaml.safe_load(text)
    assert not isinstance(raised.value, yaml.YAMLError)
    with pytest.raises(yaml.YAMLError, match="does not fit its tag"):
        load_bounded(text)


@pytest.mark.parametrize("text", ["!own 1", "!!python/object/apply:os.system [id]", "*nowhere", "[", "a: 1\n b: 2"])
def test_what_is_no_plain_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_bounded(text)
