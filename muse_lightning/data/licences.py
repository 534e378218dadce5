"""Under which licence each file of a repository is: its own SPDX tag, else the nearest folder upwards that says one."""

import json
import re
import tomllib
from collections.abc import Iterable
from email.parser import BytesHeaderParser
from email.policy import compat32
from typing import NamedTuple

from identify.extensions import EXTENSIONS

from muse_lightning.data.licence_expressions import UNKNOWN, declared_expression, identifiers, joined
from muse_lightning.data.licence_texts import recognise

# As GitHub finds them (https://github.com/licensee/licensee/blob/main/docs/what-we-look-at.md): LICENSE, COPYING and
# UNLICENSE, with an ending or a licence's name before or behind.
_LICENCE_STEM = re.compile(r"(?:[\w.+]+[-_.])?(?:un)?licen[cs]es?(?:[-_.].*)?|copying(?:[-_.].*)?", re.IGNORECASE)
_TEXT_ENDINGS = frozenset({"txt", "md", "markdown", "rst", "html", "htm", "adoc", "tex"})
# LICENSE-MIT beside LICENSE-APACHE is a choice: C-PERMISSIVE,
# https://rust-lang.github.io/api-guidelines/necessities.html
_NAMES_A_LICENCE = re.compile(r"mit|apache|asl|bsd|isc|gpl|mpl|zlib|boost|bsl|cc0|unlicen|psf|artistic", re.IGNORECASE)
# Beyond any honest one; some parsers take long over hostile ones.
_MAX_METADATA_BYTES = 200_000
# In one line: tomllib takes the square of the parts of a dotted key.
_MAX_DOTS = 500
# A short file that says where the licences are: "see LICENSE.APACHE and LICENSE.BSD".
_MAX_POINTER_BYTES = 1500
# Metadata of an installed or packed distribution is about the folder it lies in, and so are its licences (PEP 639):
# those of parts keep their path below. A folder of licences is about its parent (https://reuse.software/spec-3.3/).
_DIST_INFO = re.compile(r"(?P<above>(?:.*/)?)[^/]+\.(?:dist|egg)-info(?:/licenses)?(?P<below>/.*)?", re.IGNORECASE)
_LICENCE_FOLDERS = frozenset({"licenses", "licences", "license", "licence"})

# https://spdx.github.io/spdx-spec/v3.0.1/annexes/using-SPDX-short-identifiers-in-source-files/
_TAG = b"SPDX-License-Identifier:"
_TAG_VALUE = re.compile(rb"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+:()\- ]+)")
_TAG_BYTES = 2000


class _Text(NamedTuple):
    """What one licence file says."""

    name: str
    licences: tuple[str, ...]
    is_complete: bool
    is_restricted: bool
    points_to: str
    """The text in lower case, where it is short enough to be a mere pointer and nothing was recognised."""


def is_licence_name(path: str) -> bool:
    """Whether a file may say a repository's licence, by its name: a licence text or a package's metadata."""
    name = path.rpartition("/")[2]
    return name in _METADATA or _is_licence_text(name)


class LicenceFinder:
    """The licences of one repository. Every file is added, in any order; then each can be asked for.

    Keeps conclusions only: memory grows with the number of licence files and of files that carry an SPDX tag.
    """

    def __init__(self, declared: str | None = None) -> None:
        """
        Args:
            declared: What the source says of the whole repository: an SPDX expression, or words. It counts where no
                file says more.
        """
        self._declared = declared_expression(declared)
        self._tags: dict[str, str] = {}
        self._metadata: dict[str, str] = {}
        self._texts: dict[str, list[_Text]] = {}
        self._conclusions: dict[str, str | None] = {}

    def add(self, path: str, content: bytes) -> None:
        """Note what a file says of licences, if anything."""
        name = path.rpartition("/")[2]
        if name in _METADATA:
            licence = declared_licence(name, content)
            if licence is not None:
                self._metadata[_folder_meant(path)] = licence
        elif _is_licence_text(name):
            text = recognise(content)
            pointer = "" if text.licences or len(content) > _MAX_POINTER_BYTES else content.decode("utf-8", "replace")
            self._texts.setdefault(_folder_meant(path), []).append(_Text(name, *text, pointer.lower()))
        elif content.find(_TAG, 0, _TAG_BYTES) >= 0:
            found = [declared_expression(tag.decode()) for tag in _TAG_VALUE.findall(content[:_TAG_BYTES])]
            if known := [tag for tag in found if tag is not None]:
                self._tags[path] = joined(known, "AND")
        else:
            return
        self._conclusions.clear()

    def licence_of(self, path: str) -> str | None:
        """The licence of a file as an SPDX expression: by its own tag, else by the nearest folder upwards that has a
        licence file or metadata, else as the source declares. None where nothing says one; with `LicenseRef-unknown`
        in it where a licence file was not understood."""
        return self._tags.get(path) or self._licence_of_folder(path.rpartition("/")[0])

    def _licence_of_folder(self, folder: str) -> str | None:
        # Folders whose conclusion is not known yet, downwards; a loop, because a path can be thousands of folders deep.
        pending = []
        while folder not in self._conclusions:
            pending.append(folder)
            if not folder:
                break
            folder = folder.rpartition("/")[0]
        licence = self._conclusions.get(folder, self._declared)
        for folder in reversed(pending):
            declared = self._metadata.get(folder) or (None if folder else self._declared)
            if texts := self._texts.get(folder):
                licence = _conclusion(texts, declared)
            elif declared is not None:
                licence = declared
            self._conclusions[folder] = licence
        return licence


def _conclusion(texts: Iterable[_Text], declared: str | None) -> str:
    """The licence that the licence files of one folder mean together.

    What is declared for the same folder joins texts of its licences (MIT OR Apache-2.0), and explains what nothing
    recognises; but it takes nothing back: licences found besides are added to it.
    """
    texts = sorted(texts)
    if declared is not None and not any(text.is_restricted for text in texts):
        known = set(map(_any_version, identifiers(declared)))
        others = [name for text in texts for name in text.licences if _any_version(name) not in known]
        if not others or not all(text.is_complete for text in texts):
            return joined([declared, *others], "AND")
    names = [text.name.lower() for text in texts]
    texts = [text for text in texts if not any(name in text.points_to for name in names)]
    parts = [joined([*text.licences, *([] if text.is_complete else [UNKNOWN])], "AND") for text in texts]
    is_choice = all(text.is_complete and _NAMES_A_LICENCE.search(text.name) for text in texts)
    return joined(parts, "OR" if is_choice else "AND") if parts else UNKNOWN


def _any_version(licence: str) -> str:
    """A GNU licence's text does not say whether later versions are meant."""
    return licence.removesuffix("-only").removesuffix("-or-later")


def _is_licence_text(name: str) -> bool:
    if not _LICENCE_STEM.fullmatch(name):
        return False
    ending = name.rpartition(".")[2].lower() if "." in name else ""
    return ending in _TEXT_ENDINGS or ending not in EXTENSIONS


def _folder_meant(path: str) -> str:
    folder, _, _ = path.rpartition("/")
    if match := _DIST_INFO.fullmatch(folder):
        return (match["above"] + (match["below"] or "").removeprefix("/")).rstrip("/")
    parent, _, last = folder.rpartition("/")
    return parent if last.lower() in _LICENCE_FOLDERS else folder


def declared_licence(name: str, content: bytes) -> str | None:
    """The SPDX expression that a metadata file declares, None where it declares none or is not what its name says.

    Args:
        name: One of PKG-INFO, METADATA, package.json, Cargo.toml, pyproject.toml.
    """
    if len(content) > _MAX_METADATA_BYTES:
        return None
    try:
        return _METADATA[name](content)
    except (ValueError, RecursionError, AttributeError, TypeError):
        return None


def _core_metadata(content: bytes) -> str | None:
    """https://packaging.python.org/en/latest/specifications/core-metadata/"""
    headers = BytesHeaderParser(policy=compat32).parsebytes(content)
    for field in ("License-Expression", "License"):
        expression = declared_expression(str(headers.get(field, "")))
        if expression is not None:
            return expression
    classifiers = [str(line) for line in headers.get_all("Classifier", []) if str(line).startswith("License ::")]
    named = [line.rpartition(" :: ")[2] for line in classifiers]
    return _all_known([declared_expression(name) for name in named if name != "OSI Approved"], "AND")


def _package_json(content: bytes) -> str | None:
    """https://docs.npmjs.com/cli/configuring-npm/package-json#license, and its older forms."""
    package = json.loads(content)
    stated = package.get("license") or package.get("licenses")
    entries = stated if isinstance(stated, list) else [stated]
    names = [entry.get("type") if isinstance(entry, dict) else entry for entry in entries]
    return _all_known([declared_expression(name) for name in names], "OR")


def _toml(content: bytes) -> str | None:
    """https://doc.rust-lang.org/cargo/reference/manifest.html, https://peps.python.org/pep-0639/, and Poetry's."""
    if any(line.count(b".") > _MAX_DOTS for line in content.splitlines()):
        return None
    document = tomllib.loads(content.decode("utf-8"))
    tables = (document.get("package"), document.get("project"), document.get("tool", {}).get("poetry"))
    for table in tables:
        stated = (table or {}).get("license")
        expression = declared_expression(stated.get("text") if isinstance(stated, dict) else stated)
        if expression is not None:
            return expression
    return None


def _all_known(expressions: list[str | None], operator: str) -> str | None:
    """Expressions under one operator; None where one is not known, or there is none."""
    known = [expression for expression in expressions if expression is not None]
    return joined(known, operator) if known and len(known) == len(expressions) else None


_METADATA = {
    "PKG-INFO": _core_metadata,
    "METADATA": _core_metadata,
    "package.json": _package_json,
    "Cargo.toml": _toml,
    "pyproject.toml": _toml,
}
