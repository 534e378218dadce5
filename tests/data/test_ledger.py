"""Lines of the ledger: what they hold, and what is left of them after a kill."""

import json

import numpy as np
import pytest
import torch

from muse_lightning.data.item_loader import Block
from muse_lightning.data.ledger import (
    LedgerBatch,
    LedgerDataset,
    LedgerHeader,
    batch_line,
    batch_record,
    kept_lines,
    ledger_files,
    ledger_path,
    read_ledger,
)
from muse_lightning.data.mixing import BlockId
from muse_lightning.errors import UserError

HEADER = LedgerHeader([LedgerDataset("code", "c0de", 1.0, [3, 4])], 0, 1, 1, 2, 64, 0)


def block(tokens=(5, 6, 7), starts=(1,), dtype=np.uint16, where=(0, 1, 2, 3)) -> Block:
    return Block(torch.from_numpy(np.array(tokens, dtype)), torch.tensor(starts), BlockId(*where))


def test_the_hash_is_of_tokens_and_starts_in_order():
    def hash_of(*blocks: Block) -> str:
        return json.loads(batch_line(1, 0, batch_record(blocks)))["hash"]

    one = hash_of(block(), block(tokens=(5, 6, 8)))
    assert one == hash_of(block(dtype=np.int32, where=(1, 1, 1, 1)), block(tokens=(5, 6, 8)))
    others = [
        hash_of(block(tokens=(5, 6, 8)), block()),
        hash_of(block()),
        hash_of(block(starts=(2,)), block(tokens=(5, 6, 8))),
        hash_of(block(starts=()), block(tokens=(5, 6, 8))),
    ]
    assert len({one, *others}) == 5


def test_lines_read_back(tmp_path):
    record = batch_record([block(), block(where=(1, 2, 0, 9))])
    path = tmp_path / "rank0.jsonl"
    path.write_text(HEADER.to_line() + batch_line(7, 3, record))
    header, batch = read_ledger(path)
    assert header == HEADER
    assert isinstance(batch, LedgerBatch)
    assert (batch.step, batch.batch, batch.blocks) == (7, 3, [[0, 1, 2, 3], [1, 2, 0, 9]])


def test_what_a_kill_cut_short_is_left_out(tmp_path):
    lines = [HEADER.to_line(), *(batch_line(number + 1, number, batch_record([block()])) for number in range(4))]
    path = tmp_path / "rank0.jsonl"
    path.write_text("".join(lines)[:-5])
    assert len(list(read_ledger(path))) == 4
    assert list(kept_lines(path, 2)) == lines[:3]
    assert list(kept_lines(path, 9)) == lines[:4]
    assert list(kept_lines(path, 0)) == []


@pytest.mark.parametrize("line", ["nonsense\n", "[]\n", '{"step": 1}\n', "\x00\x00\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "rank0.jsonl"
    path.write_text(HEADER.to_line() + line)
    with pytest.raises(UserError, match=r"rank0.jsonl:2 is damaged"):
        list(read_ledger(path))


def test_files_by_rank(tmp_path):
    for name in ("rank0.jsonl", "rank11.jsonl", "rank2.jsonl.bak", "rankx.jsonl"):
        (tmp_path / name).touch()
    assert ledger_files(tmp_path) == {0: tmp_path / "rank0.jsonl", 11: ledger_path(tmp_path, 11)}
    assert ledger_files(tmp_path / "none") == {}
