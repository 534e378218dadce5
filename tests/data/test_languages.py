"""Languages by name, extension and first line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muse_lightning.data import languages
from muse_lightning.data.languages import known_tags, language_of, tags_of


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("a.py", "python"),
        ("a.pyi", "python"),
        ("A.PY", "python"),
        ("a.pyx", "cython"),
        ("a.c", "c"),
        ("a.h", "c"),
        ("a.hpp", "c++"),
        ("a.mm", "objective-c++"),
        ("a.ts", "typescript"),
        ("a.tsx", "typescript"),
        ("a.f90", "fortran"),
        ("a.zsh", "shell"),
        ("a.svg", "xml"),
        ("a.ipynb", "json"),
        ("a.xhtml", "xml"),
        ("src/CMakeLists.txt", "cmake"),
        ("Makefile", "makefile"),
        ("Dockerfile.dev", "dockerfile"),
        ("README", "plain-text"),
        ("README.md", "markdown"),
        ("LICENSE.py", "python"),
        ("py", None),
        (".py", None),
        ("a.qqq", None),
        ("a.", None),
        ("", None),
        ("a.py/b", None),
        ("caf\udce9.rs", "rust"),
        ("a.png", None),
    ],
)
def test_by_name(path, language):
    assert language_of(path, tags_of(path, b"")) == language


@pytest.mark.parametrize(
    ("line", "language"),
    [
        (b"#!/usr/bin/python", "python"),
        (b"#!/usr/bin/env python3.12", "python"),
        (b"#! /usr/bin/env -S LC_ALL=C python3 -u", "python"),
        (b"#!/usr/bin/env bash", "shell"),
        (b"#!/bin/sh -e", "shell"),
        (b"#!/usr/bin/env node", "javascript"),
        (b"#!/usr/bin/lua5.4", "lua"),
        (b"#!/usr/bin/env Rscript --vanilla", "r"),
        (b"#!/usr/bin/perl\r", "perl"),
        (b"#!/opt/pythonic", None),
        (b"# /usr/bin/python", None),
        (b"#!", None),
        (b"#!/usr/bin/env", None),
        (b"#!" + b" " * 300 + b"/usr/bin/python", None),
    ],
)
def test_by_the_first_line(line, language):
    assert language_of("run", tags_of("run", line + b"\nx\n")) == language


def test_the_name_decides_before_the_first_line():
    assert tags_of("a.rs", b"#!/usr/bin/python\n") == {"rust"}


def test_a_header_passes_for_both_its_languages():
    assert {"c", "c++"} <= tags_of("a.h", b"")


def test_every_language_found_can_be_named_in_a_list():
    names = [f"a.{extension}" for extension in (*languages.EXTENSIONS, *languages._MORE_EXTENSIONS)]
    names += languages.NAMES
    found = {language_of(name, tags_of(name, b"")) for name in names} - {None}
    assert len(found) > 150
    assert found <= known_tags()
    assert found.isdisjoint({"text", "binary", "header", "image"})


def test_no_extension_is_named_twice():
    """Where identify has come to know one of ours as the same language, ours can go."""
    assert [extension for extension, tag in languages._MORE_EXTENSIONS.items()
            if tag in languages.EXTENSIONS.get(extension, ())] == []  # fmt: skip


@given(st.text(max_size=30), st.binary(max_size=300).map(lambda tail: b"#!" + tail))
def test_any_name_and_any_first_line_are_taken(path, content):
    tags = tags_of(path, content)
    assert tags == tags_of(path, content)
    assert (language_of(path, tags) is None) == (not tags)
