"""Needles: where they are hidden, and that nothing else in the haystack answers for them."""

import pytest
import torch

from muse_lightning.measure.needles import choose_needle, hide, longest_document, occurs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("offsets", "row", "expected"),
    [
        ([0, 3, 10, 10, 20, 20], 0, slice(3, 10)),
        ([0, 3, 10, 14, 20, 20], 1, slice(4, 10)),
        ([0, 10, 15, 20, 20], 1, slice(0, 5)),  # the first of equals
        ([0, 10, 20, 20, 20], 1, slice(0, 10)),
        (None, 1, slice(0, 10)),
    ],
)
def test_the_longest_document_of_a_row(offsets: list[int] | None, row: int, expected: slice) -> None:
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    assert longest_document(cu_seqlens, row, 10) == expected


@pytest.mark.parametrize(("depth", "start"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_a_needle_is_hidden_at_its_depth(depth: float, start: int) -> None:
    haystack, needle = torch.arange(20), torch.tensor([100, 101, 102, 103])
    tokens = hide(haystack, needle, depth)
    assert tokens.tolist() == [*range(start), 100, 101, 102, 103, *range(start, 12), 100, 101, 102, 103]


def test_the_control_has_cue_and_answer_alone() -> None:
    assert hide(torch.arange(20), torch.tensor([100, 101]), None).tolist() == [*range(18), 100, 101]


def test_occurrence_against_text() -> None:
    text = "abracadabra"
    tokens = torch.tensor(list(text.encode()))
    for part in ("a", "abra", "cad", "abracadabra", "abracadabrab", "dc", "bb"):
        assert occurs(torch.tensor(list(part.encode())), tokens) == (part in text), part


def test_needles_are_spans_of_one_text() -> None:
    pool = [torch.arange(100, 106), torch.arange(200, 203), torch.arange(300, 304)]
    found = {tuple(choose_needle(pool, torch.arange(50), 4, generator(seed)).tolist()) for seed in range(60)}
    assert found == {(100, 101, 102, 103), (101, 102, 103, 104), (102, 103, 104, 105), (300, 301, 302, 303)}


def test_what_is_no_needle() -> None:
    haystack = torch.arange(50)
    good = torch.arange(100, 104)
    for reason, bad in {
        "first half in the haystack": torch.tensor([10, 11, 101, 102]),
        "second half in the haystack": torch.tensor([101, 102, 10, 11]),
        "too short": torch.tensor([100, 101, 102]),
    }.items():
        assert choose_needle([bad], haystack, 4, generator()) is None, reason
        found = choose_needle([bad, good], haystack, 4, generator())
        assert found is not None, reason
        assert torch.equal(found, good), reason
    assert choose_needle([], haystack, 4, generator()) is None
    runs = torch.tensor([100] * 8 + [101] * 8)
    assert choose_needle([runs], haystack, 16, generator()) is None  # 2 of 16 tokens are distinct
    is_text = torch.ones(200, dtype=torch.bool)
    assert choose_needle([good], haystack, 4, generator(), is_text) is not None
    is_text[102] = False
    assert choose_needle([good], haystack, 4, generator(), is_text) is None
