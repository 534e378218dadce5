"""The language of a file, by its name, its extension or its first line, as the package identify knows them.

identify gives a file several tags: `module.pyi` is `pyi`, `run.zsh` is `zsh` and `shell`. An allow-list names tags. In
counts a file has one language: the tag that most extensions share.
"""

import re
from collections import Counter
from functools import lru_cache

from identify.extensions import EXTENSIONS, NAMES
from identify.identify import tags_from_filename, tags_from_interpreter
from identify.interpreters import INTERPRETERS

# Extensions that identify lacks, and names for what it calls by an extension. By extension as in Linguist's
# languages.yml (https://github.com/github-linguist/linguist), where one language alone, or by far most files, has it.
_MORE_EXTENSIONS = {
    "ada": "ada", "adb": "ada", "ads": "ada",
    "agda": "agda", "lagda": "agda",
    "am": "makefile", "mak": "makefile",
    "ac": "m4",
    "awk": "awk",
    "cbl": "cobol", "cob": "cobol", "cpy": "cobol",
    "cfg": "ini",
    "cl": "opencl",
    "d": "d",
    "el": "emacs-lisp",
    "f": "fortran", "f77": "fortran", "for": "fortran", "ftn": "fortran", "fpp": "fortran",
    "frag": "glsl", "geom": "glsl", "glsl": "glsl", "vert": "glsl", "comp": "glsl",
    "haml": "haml",
    "hx": "haxe",
    "lisp": "common-lisp", "lsp": "common-lisp",
    "org": "org",
    "pony": "pony",
    "pyi": "python",
    "rkt": "racket",
    "rmd": "markdown", "qmd": "markdown", "mdx": "markdown",
    "sed": "sed",
    "slim": "slim",
    "stan": "stan",
    "tcl": "tcl", "tk": "tcl",
    "ts": "typescript", "mts": "typescript", "cts": "typescript", "tsx": "typescript",
    "vy": "vyper",
    "wat": "webassembly",
}  # fmt: skip
_MORE_INTERPRETERS = {
    "expect": "tcl", "guile": "scheme", "julia": "julia", "lua": "lua", "luajit": "lua", "make": "makefile",
    "osascript": "applescript", "pwsh": "powershell", "pypy": "python", "Rscript": "r",
    "runhaskell": "haskell", "scala": "scala", "sed": "sed", "sbcl": "common-lisp", "tclsh": "tcl", "wish": "tcl",
    "gawk": "awk", "mawk": "awk", "deno": "typescript", "bun": "typescript", "ts-node": "typescript",
}  # fmt: skip
# What says nothing of a language.
_NO_LANGUAGE = frozenset({"text", "binary", "header", "image"})
# Where the most general tag is not the likeliest: headers of C are also those of C++.
_PREFERRED = {"h": "c", "mm": "objective-c++"}

PROSE = frozenset({"asciidoc", "markdown", "org", "plain-text", "pod", "rst", "tex"})
"""Languages written in paragraphs, which many authors keep on one line each."""

_SHEBANG = re.compile(rb"#![ \t]*(?:\S*/)?env[ \t]+(?:-\S+[ \t]+|\w+=\S*[ \t]+)*(\S+)|#![ \t]*(\S+)")
_SHEBANG_BYTES = 200


def tags_of(path: str, content: bytes) -> frozenset[str]:
    """What languages a file may be said to be in; empty where neither name nor first line tells."""
    tags = _tags_of_name(path.rpartition("/")[2])
    if not tags and content.startswith(b"#!") and (match := _SHEBANG.match(content, 0, _SHEBANG_BYTES)):
        return _tags_of_interpreter((match[1] or match[2]).decode("utf-8", "replace"))
    return tags


def language_of(path: str, tags: frozenset[str]) -> str | None:
    """The one language of a file with these tags; None without tags."""
    if len(tags) < 2:
        return next(iter(tags), None)
    preferred = _PREFERRED.get(path.rpartition(".")[2])
    return preferred if preferred in tags else _most_general(tags)


@lru_cache(maxsize=1)
def known_tags() -> frozenset[str]:
    """Every tag that an allow-list may name."""
    from_names = {tag for tags in (*EXTENSIONS.values(), *NAMES.values(), *INTERPRETERS.values()) for tag in tags}
    more = {*_MORE_EXTENSIONS.values(), *_MORE_INTERPRETERS.values()}
    return frozenset((from_names | more) - _NO_LANGUAGE)


# Names without an extension of their own differ from file to file: the cache is bounded.
@lru_cache(maxsize=4096)
def _tags_of_name(name: str) -> frozenset[str]:
    if name in NAMES:
        return frozenset(NAMES[name] - _NO_LANGUAGE)
    stem, _, extension = name.rpartition(".")
    extension = extension.lower() if stem else ""
    tags = EXTENSIONS.get(extension, set()) | {_MORE_EXTENSIONS.get(extension, "text")}
    if "binary" in tags:
        return frozenset()
    # Last, names with an ending of their own, such as Dockerfile.dev.
    return frozenset((tags - _NO_LANGUAGE) or (tags_from_filename(name) - _NO_LANGUAGE))


@lru_cache(maxsize=1024)
def _tags_of_interpreter(interpreter: str) -> frozenset[str]:
    name = interpreter.rpartition("/")[2]
    # lua5.4, pypy3.11
    more = _MORE_INTERPRETERS.get(name) or _MORE_INTERPRETERS.get(name.rstrip("0123456789.-"))
    return frozenset([more] if more else tags_from_interpreter(name) - _NO_LANGUAGE)


@lru_cache(maxsize=1024)
def _most_general(tags: frozenset[str]) -> str:
    return min(tags, key=lambda tag: (-_extensions_by_tag()[tag], tag))


@lru_cache(maxsize=1)
def _extensions_by_tag() -> Counter[str]:
    counts = Counter(tag for tags in (*EXTENSIONS.values(), *NAMES.values()) for tag in tags)
    counts.update(_MORE_EXTENSIONS.values())
    return counts
