"""Which licences a licence file holds, by its words.

The texts are those of choosealicense.com, which the package identify carries. A text is compared as SPDX's guidelines
for matching say (https://spdx.github.io/spdx-spec/v3.0.1/annexes/license-matching-guidelines-and-templates/): without
copyright lines, case, punctuation and line breaks. identify's own comparison, an edit distance of 5 % of the whole
file, names one licence at most, and none where a title, a second licence or a shorter ending makes the lengths differ.
"""

import re
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from identify.vendor.licenses import LICENSES

from muse_lightning.data.licence_expressions import declared_expression

# Words in a row that must agree. Short, so that a changed name breaks few; long enough to be a licence's own.
_RUN = 4
# Share of a licence's runs that must be found. A BSD text with other names keeps more than 0.85, the Apache licence
# without its instructions 0.87; BSD-3-Clause keeps 0.8 in a BSD-2-Clause text, but then the other explains more of it.
_MIN_FOUND = 0.8
# Words that may be left when all licences found are taken away: titles, names, "see also". In a file of many licences
# also this share of all its words, if no more than so many come in a row: what stands above each of them.
_MAX_LEFT = 60
_MAX_LEFT_SHARE = 0.1
_MAX_LEFT_IN_A_ROW = 30
_MAX_BYTES = 300_000

_COPYRIGHT = re.compile(
    r"^[^\w\n]*(?:(?:portions )?copyright\b|\(c\)|\u00a9|all rights reserved|spdx-).*$", re.IGNORECASE | re.MULTILINE
)
# Short additions that turn a permissive text into another licence: the JSON licence, the Commons Clause and the like.
_RESTRICTIONS = re.compile(
    r"not (?:for )?evil|non ?commercial|commons clause|evaluation (?:only|purposes)|personal use only|business source|"
    r"source available|proprietary|end user license|not be used (?:for|in) (?:military|training)"
)
# What a project writes that refers to a licence by name, cut out of the licences' own instructions: licence, first
# words, last words, the identifier it means.
_NOTICES = (
    ("Apache-2.0", "Licensed under the Apache License", "limitations under the License.", "Apache-2.0"),
    ("MPL-2.0", "This Source Code Form is subject", "http://mozilla.org/MPL/2.0/.", "MPL-2.0"),
    ("GPL-2.0", "This program is free software; you", "any later version.", "GPL-2.0-or-later"),
    ("GPL-3.0", "This program is free software: you", "any later version.", "GPL-3.0-or-later"),
    ("AGPL-3.0", "This program is free software: you", "any later version.", "AGPL-3.0-or-later"),
    ("LGPL-2.1", "This library is free software; you", "any later version.", "LGPL-2.1-or-later"),
)


class LicenceText(NamedTuple):
    """What a licence file holds."""

    licences: tuple[str, ...]
    """SPDX identifiers of all licences found in it, the one that explains most of it first."""
    is_complete: bool
    """Whether they explain all of it. Never true where nothing was found."""
    is_restricted: bool = False
    """Whether what they do not explain takes rights away, whatever else says so."""


class _Pattern(NamedTuple):
    licence: str
    runs: frozenset[str]


def recognise(content: bytes) -> LicenceText:
    """The licences in a licence file."""
    if len(content) > _MAX_BYTES:
        return LicenceText((), False)
    return _recognise(" ".join(_words(content.decode("utf-8", "replace"))))


# By the words that are left without the copyright lines, so that all projects under one licence share an entry.
@lru_cache(maxsize=512)
def _recognise(text: str) -> LicenceText:
    words = text.split()
    runs = _runs(words)
    left = [True] * len(words)
    found: list[str] = []
    remaining = set(runs)
    while (pattern := _best(remaining)) is not None:
        found.append(pattern.licence)
        remaining -= pattern.runs
        for start, run in enumerate(runs):
            if run in pattern.runs:
                left[start : start + _RUN] = [False] * min(_RUN, len(words) - start)
    rest = " ".join(word for word, is_left in zip(words, left, strict=True) if is_left)
    is_restricted = _RESTRICTIONS.search(rest) is not None
    is_little = sum(left) <= _MAX_LEFT or (
        sum(left) <= _MAX_LEFT_SHARE * len(words)
        and max(len(list(row)) for is_left, row in groupby(left) if is_left) <= _MAX_LEFT_IN_A_ROW
    )
    is_complete = bool(found) and is_little and not is_restricted
    return LicenceText(tuple(dict.fromkeys(found)), is_complete, is_restricted)


def _best(runs: set[str]) -> _Pattern | None:
    """The licence that explains most of the runs, less what it has that they have not; None where none is there."""
    best, best_score = None, 0
    for pattern in _patterns():
        shared = len(pattern.runs & runs)
        score = 2 * shared - len(pattern.runs)
        if shared >= _MIN_FOUND * len(pattern.runs) and score > best_score:
            best, best_score = pattern, score
    return best


@lru_cache(maxsize=1)
def _patterns() -> tuple[_Pattern, ...]:
    texts = dict(LICENSES)
    meanings = [(declared_expression(licence) or licence, text) for licence, text in texts.items()]
    for licence, first, last, meaning in _NOTICES:
        start = texts[licence].rindex(first)
        meanings.append((meaning, texts[licence][start : texts[licence].index(last, start) + len(last)]))
    return tuple(_Pattern(meaning, frozenset(_runs(_words(text)))) for meaning, text in meanings)


def _runs(words: list[str]) -> list[str]:
    return [" ".join(words[start : start + _RUN]) for start in range(max(len(words) - _RUN + 1, 1))]


def _words(text: str) -> list[str]:
    """Lower case, without copyright lines, comment marks, punctuation; spelled as SPDX's guidelines treat as equal."""
    words = re.findall(r"[^\W_]+", _COPYRIGHT.sub("", text).lower())
    return [{"licence": "license", "https": "http", "organisation": "organization"}.get(word, word) for word in words]
