"""The list of files that a dataset was made without, damaged in each way that a file can be."""

import gzip
import random

import pytest

from muse_lightning.data.left_out import LEFT_OUT_NAME, LeftOut, read_left_out, write_left_out
from muse_lightning.errors import UserError

ENTRIES = [LeftOut("minified", f"org/{random.Random(i).random()}", f"{i}.js") for i in range(2000)]


@pytest.fixture
def dataset(tmp_path):
    write_left_out(tmp_path, [], ENTRIES)
    return tmp_path


def refused(dataset) -> None:
    with pytest.raises(UserError, match=rf"{LEFT_OUT_NAME} is damaged \(.+\); prepare the dataset again"):
        list(read_left_out(dataset))


def test_what_was_written_is_read(dataset):
    assert list(read_left_out(dataset)) == ENTRIES


@pytest.mark.parametrize("place", [0, 12, 15, 600, -6])
def test_a_flipped_byte(dataset, place):
    content = bytearray((dataset / LEFT_OUT_NAME).read_bytes())
    content[place] ^= 0xFF
    (dataset / LEFT_OUT_NAME).write_bytes(content)
    refused(dataset)


@pytest.mark.parametrize(
    "line",
    ["[" * 200_000, '"abc"', "{}", '["a", "b"]', '["a", "b", "c", "d"]', '["a", "b", 3]', "null", "no JSON", ""],
    ids=lambda line: line[:16] or "empty",
)
def test_a_line_that_is_no_entry(dataset, line):
    (dataset / LEFT_OUT_NAME).write_bytes(gzip.compress(ENTRIES[0].to_line() + line.encode() + b"\n"))
    refused(dataset)
