"""Reading dataset.json and refusing what is not one; counting blocks."""

import json

import numpy as np
import pytest

from muse_lightning.data.card import (
    ChunkEntry,
    SplitEntry,
    count_blocks,
    largest_seq_len,
    long_document_share,
    read_card,
)
from muse_lightning.errors import UserError


def split_of(*tokens: int) -> SplitEntry:
    chunks = [ChunkEntry(f"chunk-{i}-0.bin", "", 0, count, 1) for i, count in enumerate(tokens)]
    return SplitEntry(1, sum(tokens), 0, {}, "", chunks)


@pytest.mark.parametrize("tokens", [(100,), (100, 37, 5), (1, 1)])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_largest_seq_len_by_trying_all(tokens, blocks):
    entry = split_of(*tokens)
    works = [n for n in range(1, 200) if sum(count // (n + 1) for count in tokens) >= blocks]
    assert largest_seq_len(entry, blocks) == max(works, default=0)
    assert all(count_blocks(entry, n) >= blocks for n in works)


def test_share_of_long_documents():
    lengths = np.array([100, 16384, 32767, 65536])
    share = long_document_share(lengths)
    total = lengths.sum()
    expected = {"16384": (16384 + 32767 + 65536) / total, "32768": 65536 / total, "65536": 65536 / total}
    assert share == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not a prepared dataset: dataset.json: No such file or directory; `muse prepare` makes one"),
        ("{", r"dataset.json is damaged: not JSON"),
        ("[" * 100_000, r"dataset.json is damaged: not JSON"),
        ("[]", r"format_version None found, 2 expected"),
        ('{"format_version": 1}', r"format_version 1 found, 2 expected"),
        ('{"format_version": 2, "splits": {}}', r"dataset.json is damaged: .*missing"),
        ('{"format_version": 2, "splits": {"train": {"chunks": []}}}', r"dataset.json is damaged"),
    ],
)
def test_what_is_no_card(tmp_path, content, message):
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_card(tmp_path)
    assert "\n" not in str(error.value)


def test_card_comes_back(make_data):
    data = make_data()
    data.prepare_data()
    card = read_card(data.dataset)
    assert json.loads(card.to_json()) == json.loads((data.dataset / "dataset.json").read_text())
    with pytest.raises(UserError, match=r"split 'tset': not in this dataset; it has train, val"):
        card.split("tset")


def test_the_bytes_of_all_ids_do_not_bury_the_rest(prepared):
    text = (prepared / "dataset.json").read_text()
    assert len(text.splitlines()) < 200
    assert text.splitlines()[-2].startswith(' "token_bytes": [1, 1, ')
    assert json.loads(text)["token_bytes"] == [1] * 256 + [0] * 3
