"""Licence texts in the shapes in which projects copy them."""

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from identify.vendor.licenses import LICENSES

from muse_lightning.data.licence_expressions import declared_expression
from muse_lightning.data.licence_texts import LicenceText, recognise

TEXTS = dict(LICENSES)
COMMONS_CLAUSE = """
    "Commons Clause" License Condition v1.0. The Software is provided to you by the Licensor under the License, as
    defined below, subject to the following condition. Without limiting other conditions in the License, the grant of
    rights under the License will not include, and the License does not grant to you, the right to Sell the Software.
"""


def holds(text: str, *licences: str) -> bool:
    return recognise(text.encode()) == LicenceText(licences, is_complete=True, is_restricted=False)


def filled(licence: str) -> str:
    """The text with the names that a project fills in."""
    return TEXTS[licence].replace("[year]", "2019-2026").replace("[fullname]", "Ada Example and others")


@pytest.mark.parametrize("licence", TEXTS)
def test_each_text_is_recognised_as_itself(licence):
    assert holds(filled(licence), declared_expression(licence))


@settings(max_examples=40)
@given(
    st.sampled_from(["MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "0BSD", "Zlib", "Apache-2.0", "MPL-2.0", "GPL-3.0"]),
    st.lists(st.text("abc \u00e9,<>@", max_size=20), max_size=50),
    st.integers(20, 130),
    st.sampled_from(["", "# ", " * ", "// "]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_holders_line_breaks_comment_marks_and_case_do_not_matter(licence, holders, width, prefix, line_end, is_upper):
    title = f"The {licence} License\n\n"
    copyrights = "".join(f"Copyright (c) 19{year} {holder}\n" for year, holder in enumerate(holders, 10))
    body = textwrap.fill(TEXTS[licence].partition("[fullname]")[2] or TEXTS[licence], width)
    text = title + copyrights + "All rights reserved.\n\n" + (body.upper() if is_upper else body)
    lines = [prefix + line for line in text.splitlines()]
    assert holds(line_end.join(lines), declared_expression(licence))


def test_many_holders_do_not_matter():
    holders = "".join(f"Copyright 2026 Holder {number} of their part of this\n" for number in range(40))
    assert holds(holders + filled("MIT"), "MIT")


def test_other_names_in_the_text_do_not_matter():
    text = filled("BSD-3-Clause").replace(
        "the copyright holder nor the names of its\n   contributors", "NAME nor names"
    )
    text = text.replace("COPYRIGHT HOLDERS AND CONTRIBUTORS", "REGENTS").replace("COPYRIGHT HOLDER OR", "AUTHOR OR")
    assert "NAME" in text
    assert "REGENTS" in text
    assert holds(text, "BSD-3-Clause")


def test_near_relatives_are_told_apart():
    without_third = filled("BSD-3-Clause").partition("3. ")[0] + filled("BSD-3-Clause").partition("derived from")[2]
    assert recognise(without_third.encode()).licences == ("BSD-2-Clause",)
    assert holds(filled("ISC"), "ISC")
    assert holds(filled("0BSD"), "0BSD")
    assert holds(TEXTS["AGPL-3.0"], "AGPL-3.0-only")


def test_an_ending_with_instructions_may_be_missing():
    terms = TEXTS["Apache-2.0"].partition("END OF TERMS")[0]
    assert len(terms) < 0.95 * len(TEXTS["Apache-2.0"])
    assert holds(terms, "Apache-2.0")


@pytest.mark.parametrize(
    ("licence", "first", "last", "meaning"),
    [
        ("Apache-2.0", "Licensed under the Apache", "under the License.", "Apache-2.0"),
        ("MPL-2.0", "This Source Code Form is subject", "/MPL/2.0/.", "MPL-2.0"),
        ("GPL-3.0", "This program is free software: you", "Also add information", "GPL-3.0-or-later"),
        ("GPL-2.0", "This program is free software; you", "later version.", "GPL-2.0-or-later"),
        ("LGPL-2.1", "This library is free software; you", "later version.", "LGPL-2.1-or-later"),
    ],
)
def test_a_notice_stands_for_its_licence(licence, first, last, meaning):
    notice = first + TEXTS[licence].rpartition(first)[2].partition(last)[0] + last
    assert 30 < len(notice.split()) < 130
    assert holds("Copyright 2026 A\n\n" + notice, meaning)


def test_several_licences_in_one_file_are_all_found():
    text = filled("MIT") + "\n----\nParts come from b:\n\n" + filled("BSD-3-Clause") + "\n----\n" + filled("Apache-2.0")
    found = recognise(text.encode())
    assert set(found.licences) == {"MIT", "BSD-3-Clause", "Apache-2.0"}
    assert found.is_complete
    assert holds(filled("MIT") * 2, "MIT")


def test_a_heading_over_each_of_many_licences_is_little():
    """As SymPy has it: who wrote the parts, before the licence of each."""
    heading = (
        "\n----\nFiles of the folder {0} are taken from the project {0} (https://{0}.org) and are licensed as:\n\n"
    )
    text = filled("BSD-3-Clause") + "".join(heading.format(f"part{i}") + filled("BSD-3-Clause") for i in range(5))
    assert holds(text, "BSD-3-Clause")
    # Terms of its own in one place may be as long as a licence, however many known ones stand beside it.
    terms = (
        "Whoever sells copies of any file named above owes the author of that file a dinner in a town of their choice "
    )
    assert not recognise((text + terms * 2 + "and a cake").encode()).is_complete


@pytest.mark.parametrize(
    ("addition", "is_restricted"),
    [
        ("The Software shall be used for Good, not Evil.", True),
        (COMMONS_CLAUSE, True),
        ("This software may be used for non-commercial purposes only.", True),
        ("Files in b/ are under our proprietary terms.", True),
        ("Other words stand here, which nobody knows. " * 10, False),
    ],
    ids=["json", "commons", "non-commercial", "proprietary", "long"],
)
def test_additions_that_change_a_licence_leave_it_incomplete(addition, is_restricted):
    text = filled("MIT") + "\n" + addition
    assert recognise(text.encode()) == LicenceText(("MIT",), is_complete=False, is_restricted=is_restricted)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MIT",
        b"See LICENSE in the other folder.\n",
        b"Permission is hereby granted, free of charge, to any person obtaining a copy",
        b"word " * 5000,
        b"\xff\xfe\0",
        TEXTS["Apache-2.0"].encode()[: len(TEXTS["Apache-2.0"]) * 7 // 10],
        TEXTS["MIT"].encode() + b"\n" * 300_000,
    ],
)
def test_what_is_no_licence_text_gives_none(content):
    assert recognise(content) == LicenceText((), is_complete=False, is_restricted=False)


@given(st.binary(max_size=400) | st.lists(st.sampled_from(TEXTS["MIT"].split()), max_size=200).map(" ".join))
def test_any_content_is_taken(content):
    content = content if isinstance(content, bytes) else content.encode()
    assert recognise(content) == recognise(bytes(bytearray(content)))
