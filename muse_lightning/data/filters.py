"""Which files are not worth training on, and why: every file left out is counted under one reason.

Pure functions of one file's path and bytes, and of its licence. Thresholds are taken from published code models:

* Codex: Chen et al. 2021, arXiv 2107.03374, 3.1
* The Stack: Kocetkov et al. 2022, arXiv 2211.15533, with the thresholds of its code,
  https://github.com/bigcode-project/bigcode-dataset/tree/main/preprocessing
* The Stack v2: Lozhkov et al. 2024, arXiv 2402.19173, 2.1
"""

import codecs
import re
from dataclasses import dataclass
from typing import NamedTuple

from muse_lightning.data.generated import has_generated_name, has_minified_name, is_vendored, says_generated
from muse_lightning.data.languages import PROSE, known_tags, language_of, tags_of
from muse_lightning.data.licence_expressions import allow_list, is_allowed
from muse_lightning.errors import UserError, suggestion

_BLANK = re.compile(rb"(?:\xef\xbb\xbf)?\s*\Z")
# Of UTF-16 and UTF-32: such files are text, but not UTF-8, and full of NUL bytes.
_OTHER_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_NOT_ALPHANUMERIC = bytes(code for code in range(128) if not chr(code).isalnum())
# Copies are made of this much at a time, so that a huge file needs little more memory than itself.
_PIECE_BYTES = 1 << 20


class Verdict(NamedTuple):
    """What the filters say of one file."""

    reason: str | None
    """Why it is left out; None where it is kept."""
    language: str | None
    """Its language, a tag of the package identify. None where unknown, or where an earlier filter left it out."""


@dataclass(frozen=True)
class Filters:
    """Thresholds of the file filters. Sources: Codex (Chen et al. 2021), The Stack (Kocetkov et al. 2022), The Stack v2
    (Lozhkov et al. 2024), Linguist; docs/data.md says which threshold is whose."""

    max_file_bytes: int = 1_000_000
    """Larger files are left out (`oversize`). Codex takes files under 1 MB."""
    max_line_bytes: int = 1000
    """Files with a longer line are left out (`minified`). Codex, The Stack."""
    max_mean_line_bytes: int = 100
    """Files whose lines are longer than this on average are left out (`minified`). Codex, The Stack."""
    max_prose_line_bytes: int = 100_000
    """Instead of the two above for Markdown, reStructuredText, TeX and plain text, where a paragraph can be one line
    (`minified`). The Stack v2."""
    min_alphanumeric: float = 0.25
    """Files with a smaller share of letters and digits are left out (`symbols`). A byte of a character that is not
    ASCII counts as one. The Stack."""
    skip_generated: bool = True
    """Whether to leave out files that say in their first lines that a program wrote them, lock files, source maps
    (`generated`). The Stack v2, Linguist."""
    skip_vendored: bool = True
    """Whether to leave out what paths such as vendor/, third_party/ or node_modules/ mark as copied from other
    projects (`vendored`). The Stack v2, Linguist."""
    languages: list[str] | None = None
    """Keep only files in one of these languages, by name, extension or first line (`language`): tags of the package
    identify such as python, c, c++, rust, shell, markdown. Null: any, known or not."""
    licences: list[str] | None = None
    """Keep only files that may be used under these licences (`licence`): SPDX identifiers, or `permissive` for a ready
    list. Of `MIT OR GPL-3.0-only` one must be listed, of AND all. Null: any licence."""
    keep_unlicensed: bool = False
    """Where `licences` is set: whether to keep files for which neither a licence file nor metadata says a licence. The
    Stack left them out at first, The Stack v2 keeps them."""

    def __post_init__(self) -> None:
        for name in ("max_file_bytes", "max_line_bytes", "max_mean_line_bytes", "max_prose_line_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"filters.{name}: {getattr(self, name)} found, at least 1 expected")
        if not 0 <= self.min_alphanumeric <= 1:
            raise UserError(f"filters.min_alphanumeric: {self.min_alphanumeric} found, a share from 0 to 1 expected")
        for name in ("languages", "licences"):
            if getattr(self, name) == []:
                raise UserError(f"filters.{name}: an empty list leaves nothing; null keeps every file")
        for language in self.languages or ():
            if language not in known_tags():
                raise UserError(f"filters.languages: {language!r} found{suggestion(language, known_tags())}")
        allow_list(tuple(self.licences or ()))

    def check(self, path: str, content: bytes) -> Verdict:
        """Whether one file is kept, by its path inside the repository and its bytes."""
        reason = self._reason_by_name_and_size(path, content)
        if reason is not None:
            return Verdict(reason, None)
        tags = tags_of(path, content)
        if self.languages is not None and tags.isdisjoint(self.languages):
            return Verdict("language", None)
        return Verdict(self._reason_in_content(content, tags), language_of(path, tags))

    def check_licence(self, licence: str | None) -> str | None:
        """The reason to leave a file out by its licence, or None.

        Args:
            licence: SPDX expression; None where nothing says one.
        """
        if self.licences is None:
            return None
        is_kept = self.keep_unlicensed if licence is None else is_allowed(licence, allow_list(tuple(self.licences)))
        return None if is_kept else "licence"

    def _reason_by_name_and_size(self, path: str, content: bytes) -> str | None:
        if len(content) > self.max_file_bytes:
            return "oversize"
        if _BLANK.match(content):
            return "empty"
        if self.skip_vendored and is_vendored(path):
            return "vendored"
        if self.skip_generated and has_generated_name(path):
            return "generated"
        return "minified" if has_minified_name(path) else None

    def _reason_in_content(self, content: bytes, tags: frozenset[str]) -> str | None:
        if content.startswith(_OTHER_BOMS):
            return "undecodable"
        if b"\0" in content:
            return "binary"
        if not is_utf8(content):
            return "undecodable"
        if PROSE.isdisjoint(tags):
            if has_longer_line(content, self.max_line_bytes) or mean_line_bytes(content) > self.max_mean_line_bytes:
                return "minified"
        elif has_longer_line(content, self.max_prose_line_bytes):
            return "minified"
        if self.skip_generated and says_generated(content):
            return "generated"
        return None if has_alphanumeric_share(content, self.min_alphanumeric) else "symbols"


def is_utf8(content: bytes) -> bool:
    """Whether these bytes are UTF-8 (without surrogates and overlong forms), in little memory."""
    if content.isascii():
        return True
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        for start in range(0, len(content), _PIECE_BYTES):
            decode(content[start : start + _PIECE_BYTES])
        decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def has_longer_line(content: bytes, limit: int) -> bool:
    """Whether a line has more than `limit` bytes without its end.

    Instead of looking at every line: from the end of one, the last line end within reach is taken, and so on.
    """
    line_end = _line_end(content)
    start = 0
    while len(content) - start > limit:
        end = content.rfind(line_end, start, start + limit + 1)
        if end < 0:
            # One byte more where the line ends in \r\n.
            if content[start + limit : start + limit + 2] != b"\r\n":
                return True
            end = start + limit + 1
        start = end + 1
    return False


def mean_line_bytes(content: bytes) -> float:
    """Bytes of a line on average, without its end."""
    line_end = _line_end(content)
    ends = content.count(line_end)
    lines = ends + (not content.endswith(line_end))
    return (len(content) - ends) / lines if lines else 0.0


def has_alphanumeric_share(content: bytes, share: float) -> bool:
    """Whether at least this share of the bytes are ASCII letters and digits, or belong to other characters."""
    needed = share * len(content)
    found = 0
    # Most files have enough in their first half.
    piece = min(max(len(content) // 2, 1024), _PIECE_BYTES)
    for start in range(0, len(content), piece):
        if found >= needed:
            break
        found += len(content[start : start + piece].translate(None, _NOT_ALPHANUMERIC))
    return found >= needed


def _line_end(content: bytes) -> bytes:
    """What ends lines: a carriage return only where there is no line feed at all."""
    return b"\r" if b"\n" not in content and b"\r" in content else b"\n"


DEFAULT_FILTERS = Filters()
