"""Readers on bytes that nobody meant: whatever comes, it is read, counted, or refused in one line.

The default run is short. `python -m tests.data.sources.fuzz SECONDS` goes on for as long as you like; what it found is
in docs/fuzzing.md.
"""

import pytest

from tests.data.sources.fuzz import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_a_short_run(target):
    target(max_examples=40)
