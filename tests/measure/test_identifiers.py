"""Names found in repositories written by hand, with the exact tokens."""

import keyword
import re
from collections.abc import Sequence

import pytest

from muse_lightning.data.tokenizer import ByteTokenizer, Tokenizer
from muse_lightning.measure.identifiers import _DEFINITION, KEYWORDS, MIN_LENGTH, Mention, Separators, find_mentions
from tests.pretrained.test_prompt import byte_level

BYTES = ByteTokenizer()

REPOSITORY = """<|repo_name|>settings_reader
<|file_sep|>reader/parse_value.py
def parse_value(text):
    return text.strip()

class SettingsError(Exception):
    other = parse_value

<|file_sep|>reader/main.py
from parsing import parse_value, unknown_name
parse_value(SettingsError)
def unknown_def(self): pass
<|file_sep|>reader/late.py
SettingsError, parse_value, unknown_def, def_here
def SettingsError(): pass
<|file_sep|>reader/last.py
SettingsError()
<|endoftext|><|repo_name|>another
<|file_sep|>a.py
parse_value
<|file_sep|>b.py
parse_value
"""


def tokens_of(text: str, tokenizer: Tokenizer = BYTES) -> list[int]:
    """Ids, special tokens by their names."""
    ids: list[int] = []
    names = {getattr(tokenizer.special_tokens, field): i for field, i in tokenizer.special_ids.items()}
    for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        ids += [names[piece]] if piece in names else tokenizer.encode([piece.encode()])[0].tolist() if piece else []
    return ids


def found(ids: Sequence[int], tokenizer: Tokenizer = BYTES, min_distance: int = 1) -> list[Mention]:
    return find_mentions(ids, tokenizer.token_texts, Separators(**tokenizer.special_ids), min_distance)


def place(name: str, number: int) -> int:
    """The token at which a name stands for the nth time, from 0; one token per byte and per special token."""
    plain = re.sub(r"<\|\w+\|>", "\0", REPOSITORY)
    return [match.start() for match in re.finditer(rf"\b{name}\b", plain)][number]


def test_a_repository_by_hand() -> None:
    def mention(name: str, number: int, since: int | None) -> Mention:
        start = place(name, number)
        distance = None if since is None else start - place(name, since)
        return Mention(name.encode(), start + 1, start + len(name), distance)

    expected = [
        # `parsing` and `unknown_name` are new, and `import` is no name; the path reader/main.py is no text.
        mention("parsing", 0, None),
        # Its last mention is not the definition, nor the path, but its use below.
        mention("parse_value", 3, 2),
        mention("unknown_name", 0, None),
        mention("SettingsError", 1, 0),
        # SettingsError and parse_value have been mentioned in between; unknown_def is defined in main.py.
        mention("unknown_def", 1, 0),
        mention("def_here", 0, None),
        # Redefined in late.py, mentioned there twice.
        mention("SettingsError", 4, 3),
        # The other repository defines nothing.
    ]
    assert found(tokens_of(REPOSITORY)) == expected


def test_tokens_that_cut_names_otherwise() -> None:
    """A token that holds the first letters with the space before, one that holds the last ones with a bracket."""
    texts = [b"def", b" load", b"_all", b"_files(", b")\n", b"a.py\n", b" load", b"xload_all_files", b"", b"", b""]
    separators = Separators(8, 9, 10)
    ids = [9, 5, 0, 1, 2, 3, 4, 9, 5, 6, 2, 3, 4, 7]
    assert find_mentions(ids, texts, separators, 1) == [Mention(b"load_all_files", 10, 12, 6)]


def test_names_of_one_token_are_left_out() -> None:
    texts = [b"def ", b"load_all", b"(\n", b"a\n", b"", b"", b""]
    assert find_mentions([5, 3, 0, 1, 2, 5, 3, 1, 2], texts, Separators(4, 5, 6), 1) == []


@pytest.mark.parametrize("word", ["return", "function", "struct", "static_cast", "nonlocal"])
def test_words_of_languages_are_names_only_where_they_are_defined(word: str) -> None:
    assert found(tokens_of(f"<|file_sep|>a\nx\n<|file_sep|>b\n{word} x")) == []
    (recalled,) = found(tokens_of(f"<|file_sep|>a\ndef {word}(): pass\n<|file_sep|>b\n{word} x"))
    assert (recalled.name, recalled.distance is None) == (word.encode(), False)


def test_pythons_keywords_are_known() -> None:
    assert {word.encode() for word in keyword.kwlist if len(word) >= MIN_LENGTH} <= KEYWORDS
    assert min(map(len, KEYWORDS)) == MIN_LENGTH


def test_near_definitions_are_left_out() -> None:
    ids = tokens_of("<|file_sep|>a\ndef load_all(): pass\n<|file_sep|>b\nload_all")
    (mention,) = found(ids)
    assert mention.distance is not None
    assert found(ids, min_distance=mention.distance) == [mention]
    assert found(ids, min_distance=mention.distance + 1) == []


@pytest.mark.parametrize(
    "text",
    [
        "<|file_sep|>a\ndef load_all(): pass\n<|file_sep|>load_all.py\nx = load_all()",
        "<|file_sep|>def load_all():\n1\n<|file_sep|>b\nx = load_all()",
        "<|file_sep|>a\ndef load_all(): pass\n<|repo_name|>b<|file_sep|>b\nx = load_all()",
        "<|file_sep|>a\ndef load_all(): pass\n<|endoftext|>b\nx = load_all()",
        "<|file_sep|>a\ndef load_all(): pass\n<|file_sep|>load_all",
    ],
    ids=["path-mentions", "path-does-not-define", "next-repository", "after-the-end", "path-alone"],
)
def test_what_is_not_recalled(text: str) -> None:
    assert found(tokens_of(text)) == []


def test_a_context_that_begins_within_a_file() -> None:
    assert [m.name for m in found(tokens_of("def load_all(): pass\n<|file_sep|>b\nload_all"))] == [b"load_all"]
    assert found(tokens_of("load_all" * 5)) == []
    assert found([]) == []


def test_another_tokenizer() -> None:
    tokenizer = byte_level()
    by_bytes, other = found(tokens_of(REPOSITORY)), found(tokens_of(REPOSITORY, tokenizer), tokenizer)
    assert by_bytes == other


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("def the_name(x):", "the_name"),
        ("    async def the_name(x):", "the_name"),
        ("class TheName:", "TheName"),
        ("class TheName", "TheName"),
        ("class TheName\r", "TheName"),
        ("class TheName < Parent", "TheName"),
        ("public final class TheName extends Parent {", "TheName"),
        ("export default class TheName implements Other {", "TheName"),
        ("enum class TheName : int {", "TheName"),
        ("function the_name() {", "the_name"),
        ("export async function* the_name() {", "the_name"),
        ("const theName = () => 1", "theName"),
        ("let theName: number", "theName"),
        ("type TheName<T> = T[]", "TheName"),
        ("type TheName struct {", "TheName"),
        ("func the_name() {", "the_name"),
        ("func (r *Reader) TheName() {", "TheName"),
        ("pub(crate) fn the_name<T>(x: T) {", "the_name"),
        ("pub unsafe fn the_name() {", "the_name"),
        ("const THE_NAME: usize = 3;", "THE_NAME"),
        ("pub trait TheName {", "TheName"),
        ("struct the_name {", "the_name"),
        ("#define THE_NAME 3", "THE_NAME"),
        ("#  define THE_NAME(x) x", "THE_NAME"),
        ("namespace the_name {", "the_name"),
        ("record TheName(int x) {", "TheName"),
        ("fun theName(x: Int) = x", "theName"),
        ("data class TheName(val x: Int)", "TheName"),
        # No definitions.
        ("class imbalance is a problem", None),
        ("# def the_name(x):", None),
        ("the function the_name()", None),
        ("struct the_name *pointer = 0;", None),
        ("struct the_name value;", None),
        ("const unsigned char *text", None),
        ("type parameters are", None),
        ("undef the_name(", None),
        ("return const_value", None),
        ("defthe_name()", None),
    ],
)
def test_what_is_a_definition(line: str, name: str | None) -> None:
    matches = list(_DEFINITION.finditer(f"first line\n{line}\nlast line".encode()))
    assert [match[match.lastgroup or ""].decode() for match in matches] == ([] if name is None else [name])
