"""Identifiers that a file of a repository uses and an earlier file has defined, found in the tokens of a context."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

MIN_LENGTH = 6
"""Letters, digits and underscores: shorter names are guessed, or are words of every program."""

KEYWORDS = frozenset(
    b"""
    abstract alignas alignof assert associatedtype boolean callable checked companion concept consteval constexpr
    constinit const_cast continue co_await co_return co_yield debugger decimal declare decltype default define defined
    deinit delegate delete double dynamic_cast endforeach endwhile ensure except explicit export extends extension
    extern fallthrough fileprivate finally foreach friend function global ifndef implements implicit import include
    include_once inline instanceof insteadof interface internal lambda lateinit module mutable mutating namespace native
    noexcept nonlocal nullptr number object operator override package params pragma private protected protocol public
    readonly register reinterpret_cast require require_once requires rescue return sealed select signed sizeof static
    static_assert static_cast strictfp string struct subscript suspend switch synchronized template thread_local throws
    transient typealias typedef typename typeof unchecked undefined unless unsafe unsigned vararg virtual volatile
    """.split()
)
"""Words of C, C++, C#, Go, Java, JavaScript, Kotlin, PHP, Python, Ruby, Rust, Swift and TypeScript of at least that
length: a program has them whatever its names are."""

_NAME = rb"[A-Za-z_][A-Za-z0-9_]*"
_WORD = re.compile(rb"(?<![A-Za-z0-9_])" + _NAME)
# Only where a keyword opens a line, but for modifiers, and what follows the name is not another word: "class" and
# "function" are words of comments and of prose too.
_DEFINITION = re.compile(
    rb"^[ \t]*(?:(?:export|default|declare|public|private|protected|internal|static|final|abstract|async|inline"
    rb"|extern|constexpr|unsafe|virtual|override|open|sealed|data|pub(?:\([a-z]+\))?)[ \t]+)*"
    rb"(?:"
    rb"(?:def|class|function|fn|func|fun|struct|enum|union|trait|interface|protocol|module|namespace|record)"
    rb"(?:[ \t]+(?:class|struct))?"  # enum class
    rb"(?:[ \t]*\*|[ \t]*\([^()\n]*\))?"  # function* of JavaScript, func (receiver) of Go
    rb"[ \t]+(?P<named>" + _NAME + rb")(?=[ \t]*(?:[(<\[{:;=\r\n]|\Z|(?:extends|implements|where|with|final)\b))"
    rb"|\#[ \t]*define[ \t]+(?P<macro>" + _NAME + rb")"
    rb"|(?:const|let|var|val|type)[ \t]+(?P<valued>" + _NAME + rb")(?=[ \t]*(?:[:=<\[]|(?:struct|interface|func)\b))"
    rb")",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Separators:
    """Ids of the special tokens that divide a context."""

    repo_name: int
    """Opens a document; its name follows."""
    file_sep: int
    """Opens a file; its path and a newline follow."""
    end: int
    """Ends a document."""


@dataclass(frozen=True)
class Mention:
    """An identifier of more than one token, whose tokens after the first are asked for."""

    name: bytes
    start: int
    """Its second token in the context."""
    stop: int
    """The token after its last."""
    distance: int | None
    """Tokens since the definition's file last mentioned it; None: it has not been mentioned before."""


def find_mentions(
    ids: Sequence[int], token_texts: Sequence[bytes], separators: Separators, min_distance: int
) -> list[Mention]:
    """Identifiers that are recalled from an earlier file, and others that cannot be.

    A name counts as **recalled** where it stands for the first time since the end of an earlier file of the same
    document that defines it (`def name`, `class Name`, `const NAME =`, ... at the start of a line), and is not being
    defined. Its distance is counted from its last mention, which lies in the file of the definition: from nowhere
    nearer can it be copied. A name is of the **control** where the document has not mentioned it before, in any file
    but the first, again without being defined there, and it is no word of a language. Paths of files are mentions, but
    neither.

    Args:
        ids: tokens of one context.
        token_texts: bytes of each id.
        separators: special tokens.
        min_distance: tokens; recalled names at less are left out.
    Returns:
        In the order of their places; names of one token are left out.
    """
    found = []
    for files in _documents(ids, separators):
        last: dict[bytes, tuple[int, int]] = {}  # name -> file, first token
        home: dict[bytes, int] = {}  # name -> the last file that defines it
        for number, span in enumerate(files, start=-1 if files[0].is_name else 0):
            file = _File(ids, token_texts, span)
            definitions = file.definitions()
            for name, begin in file.names():
                start, stop = file.tokens_of(begin, begin + len(name))
                before, last[name] = last.get(name), (number, start)
                if begin < file.content or begin in definitions or stop - start < 2:
                    continue
                if before is None:
                    if number > 0 and name not in KEYWORDS:
                        found.append(Mention(name, start + 1, stop, None))
                elif home.get(name) == before[0] < number and start - before[1] >= min_distance:
                    found.append(Mention(name, start + 1, stop, start - before[1]))
            home.update(dict.fromkeys(definitions.values(), number))
    return found


@dataclass(frozen=True)
class _Span:
    """Tokens of one file, without its separator."""

    start: int
    stop: int
    has_path: bool
    """Whether the first line is a path; not where the context begins within a file."""
    is_name: bool = False
    """Whether it is the name of the repository."""


class _File:
    """The text of a span, and which token each byte belongs to."""

    def __init__(self, ids: Sequence[int], token_texts: Sequence[bytes], span: _Span) -> None:
        texts = [token_texts[i] for i in ids[span.start : span.stop]]
        self.text = b"".join(texts)
        self._first = span.start
        self._ends = list(accumulate(map(len, texts)))
        newline = self.text.find(b"\n")
        self.content = len(self.text) if span.is_name or (span.has_path and newline < 0) else 0
        """Where the content begins, behind the path."""
        if span.has_path and newline >= 0:
            self.content = newline + 1

    def names(self) -> Iterator[tuple[bytes, int]]:
        """Identifiers, paths included, with their first byte."""
        return ((m[0], m.start()) for m in _WORD.finditer(self.text) if len(m[0]) >= MIN_LENGTH)

    def definitions(self) -> dict[int, bytes]:
        """First byte -> name, of each definition."""
        found = {}
        for match in _DEFINITION.finditer(self.text, self.content):
            group = str(match.lastgroup)
            if len(match[group]) >= MIN_LENGTH:
                found[match.start(group)] = match[group]
        return found

    def tokens_of(self, begin: int, end: int) -> tuple[int, int]:
        """The tokens that hold the bytes from `begin` to before `end`: first, and after the last."""
        return self._first + bisect_right(self._ends, begin), self._first + bisect_right(self._ends, end - 1) + 1


def _documents(ids: Sequence[int], separators: Separators) -> Iterator[list[_Span]]:
    """The files of each document of a context."""
    spans: list[_Span] = []
    start, has_path, is_name = 0, False, False
    for place, token in enumerate([*ids, separators.end]):
        if token not in (separators.repo_name, separators.file_sep, separators.end):
            continue
        if place > start:
            spans.append(_Span(start, place, has_path, is_name))
        start, has_path, is_name = place + 1, token == separators.file_sep, token == separators.repo_name
        if token != separators.file_sep and spans:
            yield spans
            spans = []
