"""SPDX expressions against allow-lists, and what metadata says in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from license_expression import get_license_index

from muse_lightning.data.licence_expressions import (
    PERMISSIVE,
    UNKNOWN,
    allow_list,
    declared_expression,
    is_allowed,
    joined,
)
from muse_lightning.errors import UserError


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only or MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND Apache-2.0", True),
        ("MIT AND (GPL-2.0-only OR Apache-2.0)", True),
        ("(MIT AND GPL-2.0-only) OR GPL-3.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("Apache-2.0+", True),
        ("Apache-2.0+ AND MIT", True),
        ("GPL-2.0+", False),
        (UNKNOWN, False),
        (f"MIT AND {UNKNOWN}", False),
        (f"MIT OR {UNKNOWN}", True),
        ("MITT", False),
        ("MIT AND", False),
        ("MIT MIT", False),
        ("()", False),
        ("(OR MIT", False),
        ("NOASSERTION", False),
        ("NONE", False),
        ("", False),
        ("OR".join(["("] * 300), False),
        (" OR ".join(["MIT"] * 100), False),
    ],
)
def test_what_a_list_of_mit_and_apache_admits(expression, expected):
    assert is_allowed(expression, frozenset({"MIT", "Apache-2.0"})) is expected


def test_an_exception_can_be_listed_with_its_licence():
    pair = allow_list(("gpl-2.0 with classpath-exception-2.0",))
    assert is_allowed("GPL-2.0-only WITH Classpath-exception-2.0", pair)
    assert not is_allowed("GPL-2.0-only", pair)
    assert not is_allowed("GPL-2.0-only WITH Bison-exception-2.2", pair)


def test_old_identifiers_mean_the_new_ones():
    assert allow_list(("GPL-3.0",)) == {"GPL-3.0-only"}
    assert is_allowed("LGPL-2.1+", allow_list(("LGPL-2.1-or-later",)))


def test_names_of_lists_stand_among_identifiers():
    assert allow_list(("permissive", "MPL-2.0")) == PERMISSIVE | {"MPL-2.0"}


@pytest.mark.parametrize("entry", ["MIT OR ISC", "MIT AND ISC", "", "MIT,ISC"])
def test_an_entry_is_one_licence(entry):
    with pytest.raises(UserError, match="found, one SPDX identifier or permissive expected"):
        allow_list((entry,))


@pytest.mark.parametrize(
    ("entry", "nearest"),
    [
        ("GPL3", "GPL-3.0-only, GPL-3.0-or-later"),
        ("GPLv3", "GPL-3.0-only, GPL-3.0-or-later"),
        ("lgpl-2", "LGPL-2.0-only, LGPL-2.1-only"),
        ("Apache2", "Apache-2.0"),
        ("Apache-2", "Apache-2.0"),
        ("permisive", "permissive"),
    ],
)
def test_what_is_not_known_names_the_nearest(entry, nearest):
    with pytest.raises(UserError, match=f"'{entry}' is no SPDX identifier; nearest: {nearest}"):
        allow_list((entry,))


def test_permissive_licences_are_permissive_for_scancode():
    category = {}
    for entry in get_license_index():
        for name in (entry["spdx_license_key"], *entry["other_spdx_license_keys"]):
            category[name] = entry["category"]
    assert len(PERMISSIVE) > 30
    assert {category[name] for name in PERMISSIVE} == {"Permissive", "Public Domain"}


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("MIT", "MIT"),
        (" apache-2.0 ", "Apache-2.0"),
        ("MIT License", "MIT"),
        ("The MIT License (MIT)", "MIT"),
        ("Apache License, Version 2.0", "Apache-2.0"),
        ("Apache Software License 2.0", "Apache-2.0"),
        ("BSD 3-Clause License", "BSD-3-Clause"),
        ("new BSD", "BSD-3-Clause"),
        ("ISC License (ISCL)", "ISC"),
        ("Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0"),
        ("GPL v3", "GPL-3.0-only"),
        ("GNU General Public License v2 or later (GPLv2+)", "GPL-2.0-or-later"),
        ("GNU Lesser General Public License v3 (LGPLv3)", "LGPL-3.0-only"),
        ("GPL-3.0", "GPL-3.0-only"),
        ("MIT/Apache-2.0", "MIT OR Apache-2.0"),
        ("(MIT or Apache-2.0) and Unicode-3.0", "(MIT OR Apache-2.0) AND Unicode-3.0"),
        ("apache-2.0 with llvm-exception", "Apache-2.0 WITH LLVM-exception"),
        ("LicenseRef-Mine", "LicenseRef-Mine"),
        ("UNLICENSED", "LicenseRef-proprietary"),
        ("Other/Proprietary License", "LicenseRef-proprietary"),
        ("BSD", None),
        ("BSD License", None),
        ("GPL", "GPL-1.0-or-later"),
        ("SEE LICENSE IN LICENSE.txt", None),
        ("MIT and something", None),
        ("UNKNOWN", None),
        ("NOASSERTION", None),
        ("", None),
        (None, None),
        ("x" * 501, None),
    ],
)
def test_what_declared_licences_mean(text, expression):
    assert declared_expression(text) == expression


def test_joined_expressions_keep_their_meaning():
    assert joined(["MIT"], "AND") == "MIT"
    assert joined(["MIT", "MIT", "ISC OR Zlib"], "AND") == "MIT AND (ISC OR Zlib)"


WORDS = st.lists(
    st.sampled_from(["MIT", "GPL-3.0-only", "OR", "AND", "WITH", "(", ")", "+", "/", "Classpath-exception-2.0", "x"]),
    max_size=9,
)


@given(st.text(max_size=40) | WORDS.map(" ".join))
def test_any_text_is_taken(text):
    expression = declared_expression(text)
    assert is_allowed(text, PERMISSIVE) in (True, False)
    if expression is not None:
        assert declared_expression(expression) == expression


LICENCES = {"MIT": True, "ISC": True, "GPL-3.0-only": False, "MPL-2.0": False}
TREES = st.recursive(
    st.sampled_from(list(LICENCES)).map(lambda name: (name, LICENCES[name])),
    lambda parts: st.tuples(st.sampled_from(["AND", "OR"]), parts, parts).map(
        lambda node: (
            f"({node[1][0]} {node[0]} {node[2][0]})",
            (node[1][1] and node[2][1]) if node[0] == "AND" else (node[1][1] or node[2][1]),
        )
    ),
    max_leaves=8,
)


@given(TREES)
def test_an_expression_holds_as_the_logic_says(tree):
    expression, expected = tree
    assert is_allowed(expression, PERMISSIVE) is expected
