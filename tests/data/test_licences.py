"""Which licence each file of a repository is under: by tags, licence files, metadata and folders."""

import json
import re
import textwrap
from collections import Counter
from importlib.metadata import PathDistribution, distributions

import pytest
from hypothesis import given
from hypothesis import strategies as st
from identify.vendor.licenses import LICENSES

from muse_lightning.data.licence_expressions import identifiers
from muse_lightning.data.licences import LicenceFinder, declared_licence, is_licence_name

TEXTS = {name: text.encode() for name, text in LICENSES}
MIT, APACHE, GPL3, BSD3 = TEXTS["MIT"], TEXTS["Apache-2.0"], TEXTS["GPL-3.0"], TEXTS["BSD-3-Clause"]
UNKNOWN = b"You may look at this text but nobody knows what it means.\n" * 20


def found(files: dict[str, bytes], path: str = "src/a.py", declared: str | None = None) -> str | None:
    """The licence of one file of a repository, which must not depend on the order of the files."""
    results = set()
    for order in (list(files), list(reversed(files))):
        finder = LicenceFinder(declared)
        for name in order:
            finder.add(name, files[name])
        results.add(finder.licence_of(path))
    (result,) = results
    return result


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("LICENSE", True),
        ("LICENCE", True),
        ("License.txt", True),
        ("licenses.md", True),
        ("LICENSE.MIT", True),
        ("LICENSE-APACHE", True),
        ("LICENSE-APACHE-2.0.txt", True),
        ("MIT-LICENSE.txt", True),
        ("BSD_LICENSE", True),
        ("UNLICENSE", True),
        ("COPYING", True),
        ("COPYING.LESSER", True),
        ("COPYING.LIB", True),
        ("a/b/LICENSE", True),
        ("PKG-INFO", True),
        ("a/package.json", True),
        ("Cargo.toml", True),
        ("pyproject.toml", True),
        ("a-1.dist-info/METADATA", True),
        ("license.py", False),
        ("licenses.json", False),
        ("license_header.c", False),
        ("copying.h", False),
        ("LICENSEE", False),
        ("unlicensed.txt", False),
        ("driving-licence/a.py", False),
        ("LICENSE/a.py", False),
        ("NOTICE", False),
        ("README", False),
        ("", False),
    ],
)
def test_names_of_files_that_may_say_a_licence(path, expected):
    assert is_licence_name(path) is expected


class TestLicenceFiles:
    @pytest.mark.parametrize("name", ["LICENSE", "COPYING", "license.md", "LICENCE.txt"])
    def test_hold_for_the_folder_and_all_below(self, name):
        files = {name: MIT}
        assert [found(files, path) for path in ("a.py", "a/b/c/d.py", name)] == ["MIT"] * 3

    def test_below_another_hold_there(self):
        files = {"LICENSE": MIT, "lib/gpl/COPYING": GPL3}
        assert found(files, "lib/a.c") == "MIT"
        assert found(files, "lib/gpl/a.c") == "GPL-3.0-only"
        assert found(files, "lib/gpl/deep/a.c") == "GPL-3.0-only"
        assert found(files, "lib/gplus/a.c") == "MIT"

    def test_of_one_folder_alone_say_nothing_of_others(self):
        assert found({"lib/LICENSE": MIT}, "a.c") is None

    @pytest.mark.parametrize(
        "names",
        [("LICENSE-MIT", "LICENSE-APACHE"), ("LICENSE.mit", "LICENSE.apache"), ("MIT-LICENSE.txt", "APACHE-LICENSE")],
    )
    def test_that_name_their_licences_are_a_choice(self, names):
        assert set(found(dict(zip(names, (MIT, APACHE), strict=True))).split(" OR ")) == {"MIT", "Apache-2.0"}

    def test_that_do_not_are_all_to_be_kept(self):
        assert set(found({"LICENSE": MIT, "LICENSE.bundled": GPL3}).split(" AND ")) == {"MIT", "GPL-3.0-only"}
        assert set(found({"LICENSE": MIT + APACHE}).split(" AND ")) == {"MIT", "Apache-2.0"}

    def test_that_point_to_others_say_nothing_themselves(self):
        pointer = b"This software is under either LICENSE.APACHE or LICENSE.BSD.\n"
        files = {"LICENSE": pointer, "LICENSE.APACHE": APACHE, "LICENSE.BSD": BSD3}
        assert set(found(files).split(" OR ")) == {"BSD-3-Clause", "Apache-2.0"}

    def test_that_are_not_understood_are_unknown_whatever_lies_above(self):
        assert found({"LICENSE": UNKNOWN}) == "LicenseRef-unknown"
        assert found({"LICENSE": MIT, "src/LICENSE": UNKNOWN}) == "LicenseRef-unknown"
        assert found({"LICENSE": MIT + UNKNOWN}) == "MIT AND LicenseRef-unknown"
        assert found({"LICENSE-MIT": MIT, "LICENSE-BSD": UNKNOWN}) == "LicenseRef-unknown AND MIT"

    def test_in_a_folder_of_licences_hold_for_its_parent(self):
        assert found({"lib/LICENSES/MIT.txt": b"", "lib/LICENSES/LICENSE": MIT}, "lib/a.c") == "MIT"

    def test_of_an_installed_distribution_hold_for_what_was_installed(self):
        files = {"a-1.dist-info/licenses/LICENSE": MIT, "a-1.dist-info/licenses/a/b/COPYING": GPL3}
        assert found(files, "a/c.py") == "MIT"
        assert found(files, "a/b/c.py") == "GPL-3.0-only"
        assert found({"lib/a-1.egg-info/LICENSE": MIT}, "lib/a.py") == "MIT"


class TestMetadata:
    cargo = b'[package]\nlicense = "MIT OR Apache-2.0"\n'

    def test_counts_where_there_is_no_licence_file(self):
        assert found({"Cargo.toml": self.cargo}) == "MIT OR Apache-2.0"
        assert found({"Cargo.toml": self.cargo, "LICENSE": GPL3}) == "GPL-3.0-only"

    def test_joins_the_texts_of_its_licences(self):
        assert found({"Cargo.toml": self.cargo, "LICENSE": MIT, "COPYING": APACHE}) == "MIT OR Apache-2.0"
        assert found({"Cargo.toml": b'[package]\nlicense = "GPL-3.0-or-later"', "COPYING": GPL3}) == "GPL-3.0-or-later"

    def test_explains_what_is_not_understood_but_takes_nothing_back(self):
        assert found({"Cargo.toml": self.cargo, "LICENSE": UNKNOWN}) == "MIT OR Apache-2.0"
        assert found({"Cargo.toml": self.cargo, "LICENSE": MIT + UNKNOWN}) == "MIT OR Apache-2.0"
        assert found({"Cargo.toml": self.cargo, "LICENSE": GPL3 + UNKNOWN}) == "(MIT OR Apache-2.0) AND GPL-3.0-only"

    def test_does_not_lift_a_restriction(self):
        evil = MIT + b"The Software shall be used for Good, not Evil.\n"
        assert found({"package.json": b'{"license": "MIT"}', "LICENSE": evil}) == "MIT AND LicenseRef-unknown"

    def test_of_a_folder_counts_there(self):
        assert found({"LICENSE": MIT, "web/package.json": b'{"license": "ISC"}'}, "web/a.js") == "ISC"

    def test_of_the_source_counts_last(self):
        assert found({}, declared="Apache License, Version 2.0") == "Apache-2.0"
        assert found({"LICENSE": UNKNOWN}, declared="ISC") == "ISC"
        assert found({"src/LICENSE": UNKNOWN}, declared="ISC") == "LicenseRef-unknown"
        assert found({"LICENSE": MIT}, declared="ISC") == "MIT"
        assert found({"Cargo.toml": self.cargo}, declared="ISC") == "MIT OR Apache-2.0"
        assert found({}, declared="whatever") is None
        assert found({}) is None

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("PKG-INFO", "License-Expression: MIT OR ISC", "MIT OR ISC"),
            ("METADATA", "License: Apache 2.0", "Apache-2.0"),
            ("PKG-INFO", "License: BSD\nClassifier: License :: OSI Approved :: MIT License", "MIT"),
            (
                "PKG-INFO",
                "Classifier: License :: OSI Approved\nClassifier: License :: OSI Approved :: MIT License",
                "MIT",
            ),
            ("PKG-INFO", "Classifier: License :: OSI Approved :: BSD License", None),
            ("PKG-INFO", "Classifier: License :: BSD License\nClassifier: License :: MIT License", None),
            ("PKG-INFO", "Name: a\n\nLicense: MIT", None),
            ("package.json", '{"license": "MIT"}', "MIT"),
            ("package.json", '{"license": {"type": "ISC"}}', "ISC"),
            ("package.json", '{"licenses": [{"type": "MIT"}, {"type": "ISC"}]}', "MIT OR ISC"),
            ("package.json", '{"licenses": [{"type": "MIT"}, {"type": "?"}]}', None),
            ("package.json", '{"license": "UNLICENSED"}', "LicenseRef-proprietary"),
            ("package.json", '{"license": "SEE LICENSE IN a"}', None),
            ("package.json", '{"license": 3}', None),
            ("package.json", '{"license": "MIT"}' + " " * 200_000, None),
            ("package.json", "[]", None),
            ("package.json", "{", None),
            ("package.json", "[" * 100_000, None),
            ("Cargo.toml", '[package]\nlicense = "MIT/Apache-2.0"', "MIT OR Apache-2.0"),
            ("Cargo.toml", "[package]\nlicense.workspace = true", None),
            ("pyproject.toml", '[project]\nlicense = "MIT"', "MIT"),
            ("pyproject.toml", '[project]\nlicense = {text = "BSD 3-Clause"}', "BSD-3-Clause"),
            ("pyproject.toml", '[project]\nlicense = {file = "LICENSE"}', None),
            ("pyproject.toml", '[tool.poetry]\nlicense = "MIT"', "MIT"),
            ("pyproject.toml", "tool = 3", None),
            ("pyproject.toml", f'{"a." * 600}a = 1\n[project]\nlicense = "MIT"', None),
            ("pyproject.toml", f'{"a." * 400}a = 1\n[project]\nlicense = "MIT"', "MIT"),
            ("pyproject.toml", "[", None),
        ],
    )
    def test_formats(self, name, content, expected):
        assert declared_licence(name, content.encode()) == expected


class TestTags:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"// SPDX-License-Identifier: GPL-2.0-only\n", "GPL-2.0-only"),
            (b"/* SPDX-License-Identifier: (MIT OR GPL-2.0+) */\n", "MIT OR GPL-2.0-or-later"),
            (b"# SPDX-License-Identifier: MIT\n# SPDX-License-Identifier: ISC\n", "MIT AND ISC"),
            (b"<!-- SPDX-License-Identifier: ISC -->\n", "ISC"),
            (b"# SPDX-License-Identifier: nonsense\n", "Zlib"),
            (b"# SPDX-License-Identifier:\n", "Zlib"),
            (b"x\n" * 1500 + b"# SPDX-License-Identifier: ISC\n", "Zlib"),
        ],
    )
    def test_of_a_file_come_before_its_folder(self, content, expected):
        files = {"LICENSE": TEXTS["Zlib"], "src/a.c": content}
        assert found(files, "src/a.c") == expected
        assert found(files, "src/b.c") == "Zlib"


def test_what_is_added_later_counts():
    finder = LicenceFinder()
    finder.add("LICENSE", MIT)
    assert finder.licence_of("a/b.py") == "MIT"
    finder.add("a/LICENSE", GPL3)
    assert finder.licence_of("a/b.py") == "GPL-3.0-only"


def test_a_path_thousands_of_folders_deep_is_taken():
    assert found({"LICENSE": MIT}, "a/" * 5000 + "b.py") == "MIT"


PATHS = st.sampled_from(
    ["LICENSE", "a/COPYING", "PKG-INFO", "package.json", "Cargo.toml", "a/b.py", "", "\udcff/LICENSE"]
)
CONTENTS = st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["license", "type"]), inner),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode()) | st.sampled_from(
    [b"[package]\nlicense=[1]", b"package=1", b"tool=[1]", b"[tool]\npoetry='x'", b"License: \xff\xfe", MIT, BSD3[:900]]
)  # fmt: skip


@given(st.lists(st.tuples(PATHS | st.text(max_size=8), CONTENTS), max_size=5), st.none() | st.text(max_size=10))
def test_any_files_are_taken_and_give_the_same_twice(files, declared):
    results = []
    for _ in range(2):
        finder = LicenceFinder(declared)
        for path, content in files:
            finder.add(path, content)
        results.append([finder.licence_of(path) for path, _ in [*files, ("x/y.py", b"")]])
    assert results[0] == results[1]


def test_wrapped_texts_with_other_holders_hold_for_folders_too():
    text = "Copyright 1999, 2003-2007 Some University\n" + textwrap.fill(MIT.decode().partition("[fullname]")[2], 60)
    assert found({"pkg/LICENSE.txt": text.encode()}, "pkg/a.py") == "MIT"


def agreement(distribution: PathDistribution) -> str:
    """Whether the licence files of an installed distribution mean what its metadata declares."""
    finder = LicenceFinder()
    own = re.compile(r"[^/]+\.dist-info/(?:licen[cs]es?/)?[^/]+", re.IGNORECASE)
    names = [file for file in distribution.files or () if own.fullmatch(str(file)) and is_licence_name(str(file))]
    texts = [file for file in names if file.name != "METADATA"]
    for file in texts:
        finder.add(str(file), file.read_binary())
    declared = declared_licence("METADATA", distribution.read_text("METADATA").encode())
    if not texts or declared is None:
        return "nothing to compare"
    found = {name.removesuffix("-only").removesuffix("-or-later") for name in identifiers(finder.licence_of("a.py"))}
    if "LicenseRef-unknown" in found:
        return "not understood"
    known = {name.removesuffix("-only").removesuffix("-or-later") for name in identifiers(declared)}
    return "agrees" if found == known else "differs"


def test_licence_files_of_the_installed_packages_mean_what_their_metadata_says():
    counts = Counter(map(agreement, distributions()))
    compared = counts["agrees"] + counts["not understood"] + counts["differs"]
    assert compared > 50
    assert counts["agrees"] >= 0.75 * compared
    assert counts["differs"] <= 0.06 * compared
