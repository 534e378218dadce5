"""SPDX licence expressions: which licences an allow-list admits, and what people write instead of an expression.

Source of the identifiers and the grammar: https://spdx.github.io/spdx-spec/v3.0.1/annexes/spdx-license-expressions/, as
the package license-expression implements them.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from license_expression import (
    LicenseSymbol,
    LicenseWithExceptionSymbol,
    Licensing,
    get_spdx_licensing,
)

from muse_lightning.errors import UserError, suggestion

UNKNOWN = "LicenseRef-unknown"
"""A text that nothing recognises. No allow-list admits it unless it names it."""
PROPRIETARY = "LicenseRef-proprietary"

# fmt: off
PERMISSIVE = frozenset({
    "0BSD", "AFL-3.0", "Apache-1.1", "Apache-2.0", "BlueOak-1.0.0", "BSD-1-Clause", "BSD-2-Clause",
    "BSD-2-Clause-Patent", "BSD-3-Clause", "BSD-3-Clause-Clear", "BSD-3-Clause-LBNL", "BSD-3-Clause-Open-MPI",
    "BSD-4-Clause", "BSL-1.0", "bzip2-1.0.6", "CC0-1.0", "CNRI-Python", "curl", "ECL-2.0", "FTL", "HPND", "ICU",
    "ISC", "libpng-2.0", "Libpng", "libtiff", "MIT", "MIT-0", "MIT-CMU", "MulanPSL-2.0", "NCSA", "NTP", "OpenSSL",
    "PHP-3.01", "PostgreSQL", "PSF-2.0", "Python-2.0", "Python-2.0.1", "TCL", "Unicode-3.0", "Unicode-DFS-2016",
    "Unlicense", "UPL-1.0", "W3C", "WTFPL", "X11", "Zlib", "ZPL-2.1",
})
# fmt: on
"""Licences without copyleft for software. All are of the category "Permissive" or "Public Domain" in ScanCode LicenseDB
(https://scancode-licensedb.aboutcode.org), which with the Blue Oak Council's list decided what is permissive in The
Stack v2 (Lozhkov et al. 2024, arXiv 2402.19173, 2.1)."""
NAMED_LISTS = {"permissive": PERMISSIVE}

# What metadata says in words, as `_in_few_words` leaves it. Names of whole families ("BSD", "GPL") are not here.
_WORDS = {
    "mit": "MIT",
    "mit mit": "MIT",
    "mit expat": "MIT",
    "expat": "MIT",
    "mit no attribution mit 0": "MIT-0",
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2 0": "Apache-2.0",
    "apache2": "Apache-2.0",
    "apache2 0": "Apache-2.0",
    "apachev2": "Apache-2.0",
    "asl 2": "Apache-2.0",
    "asl 2 0": "Apache-2.0",
    "bsd 3 clause": "BSD-3-Clause",
    "3 clause bsd": "BSD-3-Clause",
    "bsd 3": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "modified bsd": "BSD-3-Clause",
    "revised bsd": "BSD-3-Clause",
    "bsd 2 clause": "BSD-2-Clause",
    "2 clause bsd": "BSD-2-Clause",
    "bsd 2": "BSD-2-Clause",
    "simplified bsd": "BSD-2-Clause",
    "isc": "ISC",
    "isc iscl": "ISC",
    "psf": "PSF-2.0",
    "psfl": "PSF-2.0",
    "python foundation": "PSF-2.0",
    "zlib libpng": "Zlib",
    "zope public": "ZPL-2.1",
    "boost 1 0 bsl 1 0": "BSL-1.0",
    "boost 1 0": "BSL-1.0",
    "unlicense unlicense": "Unlicense",
    "cc0 1 0 universal cc0 1 0 public domain dedication": "CC0-1.0",
    "cc0": "CC0-1.0",
    "mozilla public 2 0": "MPL-2.0",
    "mozilla public 2 0 mpl 2 0": "MPL-2.0",
    "mpl 2": "MPL-2.0",
    "mpl2": "MPL-2.0",
    "gpl 2": "GPL-2.0-only",
    "gplv2": "GPL-2.0-only",
    "gnu general public 2 gplv2": "GPL-2.0-only",
    "gnu general public 2 or later gplv2+": "GPL-2.0-or-later",
    "gplv2+": "GPL-2.0-or-later",
    "gpl 3": "GPL-3.0-only",
    "gplv3": "GPL-3.0-only",
    "gnu general public 3": "GPL-3.0-only",
    "gnu general public 3 gplv3": "GPL-3.0-only",
    "gnu general public 3 or later gplv3+": "GPL-3.0-or-later",
    "gplv3+": "GPL-3.0-or-later",
    "lgpl 3": "LGPL-3.0-only",
    "lgplv3": "LGPL-3.0-only",
    "gnu lesser general public 3 lgplv3": "LGPL-3.0-only",
    "gnu lesser general public 3 or later lgplv3+": "LGPL-3.0-or-later",
    "lgplv3+": "LGPL-3.0-or-later",
    "gnu affero general public 3": "AGPL-3.0-only",
    "gnu affero general public 3 or later agplv3+": "AGPL-3.0-or-later",
    "agplv3": "AGPL-3.0-only",
    "unlicensed": PROPRIETARY,
    "proprietary": PROPRIETARY,
    "all rights reserved": PROPRIETARY,
    "other proprietary": PROPRIETARY,
}
_EMPTY_WORDS = frozenset({"the", "license", "licence", "licensed", "software", "version"})
_MAX_EXPRESSION_LENGTH = 500
_PLUS = re.compile(r"\+(?=$|[\s)])")


@lru_cache(maxsize=1)
def _licensing() -> Licensing:
    return get_spdx_licensing()


@lru_cache(maxsize=1)
def _identifiers() -> dict[str, str]:
    """Every SPDX identifier, deprecated ones too, from its lower case to the identifier to use."""
    return {
        name.lower(): symbol.key
        for symbol in _licensing().known_symbols.values()
        if not symbol.key.startswith("LicenseRef-")
        for name in (symbol.key, *symbol.aliases)
    }


@lru_cache(maxsize=4096)
def _parse(expression: str) -> Any | None:
    """The expression as a tree, or None where it is not one. Identifiers may be unknown."""
    if not expression.strip() or len(expression) > _MAX_EXPRESSION_LENGTH or not expression.isascii():
        return None
    # "or later versions" of a licence that has no identifier of its own for them: the licence itself suffices.
    plain = " ".join(
        word if word.lower() in _identifiers() else _PLUS.sub("", word)
        for word in re.sub(r"([()])", r" \1 ", expression).split()
    )
    try:
        return _licensing().parse(plain, strict=False)
    except Exception:
        # Malformed text makes the parser raise more than its own errors: IndexError ("()"), AssertionError ("(OR MIT").
        return None


def declared_expression(text: str | None) -> str | None:
    """The SPDX expression that a declared licence means: an expression (with "/" for OR, as Cargo once had it), or
    words such as "Apache License, Version 2.0". None where it says nothing, or only a family of licences ("BSD")."""
    if not text or len(text) > _MAX_EXPRESSION_LENGTH:
        return None
    words = _WORDS.get(_in_few_words(text))
    if words is not None:
        return words
    tree = _parse(re.sub(r"\s*/\s*", " OR ", text.strip()))
    if tree is None or any(not _is_identifier(name) for name in identifiers(tree)):
        return None
    return str(tree.render())


def identifiers(expression: Any) -> set[str]:
    """The licences and exceptions that an expression names; empty where it is none."""
    tree = _parse(expression) if isinstance(expression, str) else expression
    if tree is None:
        return set()
    return {part.key for symbol in tree.symbols for part in _parts(symbol)}


def joined(expressions: Iterable[str], operator: str) -> str:
    """Expressions under one operator, AND or OR, each once."""
    distinct = list(dict.fromkeys(expressions))
    if len(distinct) == 1:
        return distinct[0]
    return f" {operator} ".join(f"({part})" if " " in part else part for part in distinct)


@lru_cache(maxsize=4096)
def is_allowed(expression: str, allowed: frozenset[str]) -> bool:
    """Whether one who may use only the allowed licences may use a work under this expression.

    Of an OR one side must be allowed, of an AND all. `X WITH exception` is allowed where X is, because exceptions only
    add permissions, or where the list has the pair. What is no expression is not allowed.
    """
    tree = _parse(expression)
    return tree is not None and _holds(tree, allowed)


@lru_cache(maxsize=16)
def allow_list(names: tuple[str, ...]) -> frozenset[str]:
    """The licences that an allow-list of a recipe means: SPDX identifiers, `X WITH exception`, names of ready lists.

    Raises:
        UserError: an entry is none of these.
    """
    allowed: set[str] = set()
    for name in names:
        if name in NAMED_LISTS:
            allowed |= NAMED_LISTS[name]
            continue
        tree = _parse(name)
        if not isinstance(tree, LicenseSymbol | LicenseWithExceptionSymbol):
            raise UserError(
                f"filters.licences: {name!r} found, one SPDX identifier or {' or '.join(NAMED_LISTS)} expected"
            )
        for identifier in identifiers(tree):
            if not _is_identifier(identifier):
                raise UserError(f"filters.licences: {name!r} is no SPDX identifier{_suggested(identifier)}")
        allowed.add(tree.render())
    return frozenset(allowed)


def _suggested(name: str) -> str:
    """`suggestion` of identifiers that begin as the name does, as GPL-3.0-only for GPLv3; else of any."""
    start = _in_short(name)
    begin = [found for found in set(_identifiers().values()) if start and _in_short(found).startswith(start)]
    if begin:
        return f"; nearest: {', '.join(sorted(begin, key=lambda found: (len(found), found))[:3])}"
    return suggestion(name, {*_identifiers().values(), *NAMED_LISTS})


def _in_short(name: str) -> str:
    """Letters and digits alone, without the v of a version."""
    return re.sub(r"[^a-z0-9]|v(?=\d)", "", name.lower())


def _holds(tree: Any, allowed: frozenset[str]) -> bool:
    if isinstance(tree, _licensing().OR):
        return any(_holds(part, allowed) for part in tree.args)
    if isinstance(tree, _licensing().AND):
        return all(_holds(part, allowed) for part in tree.args)
    return tree.render() in allowed or _parts(tree)[0].key in allowed


def _parts(symbol: Any) -> list[Any]:
    """A licence, or a licence and its exception."""
    if isinstance(symbol, LicenseWithExceptionSymbol):
        return [symbol.license_symbol, symbol.exception_symbol]
    return [symbol]


def _is_identifier(name: str) -> bool:
    return name.startswith(("LicenseRef-", "DocumentRef-")) or name.lower() in _identifiers()


def _in_few_words(text: str) -> str:
    """Lower case without punctuation and the words that tell no licence from another."""
    words = re.findall(r"[a-z0-9+]+", re.sub(r"\bv(?:er(?:sion)?)?\.?\s*(?=\d)", "", text.lower()))
    return " ".join(word for word in words if word not in _EMPTY_WORDS)
