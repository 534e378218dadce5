"""Lines of the ledger: what they hold, and what is left of them after a kill."""

import json

import numpy as np
import pytest
import torch

from muse_lightning.data.block_reader import Block
from muse_lightning.data.ledger import (
    LedgerBatch,
    LedgerDataset,
    LedgerHeader,
    batch_line,
    batch_record,
    is_cut_short,
    kept_lines,
    ledger_files,
    ledger_path,
    read_ledger,
)
from muse_lightning.data.mixing import BlockId
from muse_lightning.errors import UserError

DATASETS = [LedgerDataset("code", "c0de", 1.0, [3, 4, 5]), LedgerDataset("more", "30e5", 0.5, [10])]
HEADER = LedgerHeader(DATASETS, 0, 1, 1, 2, 64, 0)


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


BATCH = '{"step":1,"batch":0,"hash":"00","blocks":[[0,1,1,3]]}\n'


@pytest.mark.parametrize(
    "line",
    [
        "nonsense\n",
        BATCH[:20] + "\n",
        "[]\n",
        '{"step": 1}\n',
        "\x00\x00\n",
        "\n",
        "[" * 100_000 + "\n",
        '{"batch": 0}\n',
        BATCH.replace('"step"', '"stop"'),
        BATCH.replace('"00"', "7"),
        BATCH.replace('"batch":0', '"batch":-1'),
        BATCH.replace('"step":1', '"step":"1"'),
        BATCH.replace("[0,1,1,3]", "3"),
        BATCH.replace("[[0,1,1,3]]", "3"),
        BATCH.replace("[0,1,1,3]", "[0,1,1]"),
        BATCH.replace("[0,1,1,3]", "[0,1,1,4]"),  # blocks, chunks and datasets that there are not
        BATCH.replace("[0,1,1,3]", "[0,1,3,0]"),
        BATCH.replace("[0,1,1,3]", "[2,1,0,0]"),
        BATCH.replace("[0,1,1,3]", "[0,1,0,-1]"),
        HEADER.to_line().replace("[3,4,5]", "7"),
        HEADER.to_line().replace("[3,4,5]", '["3"]'),
        HEADER.to_line().replace('"ranks_per_block":1', '"ranks_per_block":0'),
        HEADER.to_line().replace('"datasets":[', '"datasets":[7,'),
        HEADER.to_line().replace('"c0de"', "7"),
        HEADER.to_line().replace("[3,4,5]", f"[3,{1 << 40},5]"),
        HEADER.to_line().replace("[3,4,5]", f"[{1 << 39}]").replace("[10]", f"[{1 << 39}]"),
        HEADER.to_line().replace('"seq_len":64', '"seq_len":1' + 4000 * "0"),
        HEADER.to_line().replace('"weight":0.5', '"weight":"much"'),
        HEADER.to_line().replace('"weight":0.5', '"weight":-0.5'),
        HEADER.to_line().replace('"weight":0.5', '"weight":NaN'),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "rank0.jsonl"
    path.write_text(HEADER.to_line() + BATCH)
    assert len(list(read_ledger(path))) == 2
    path.write_text(HEADER.to_line() + line + BATCH)
    with pytest.raises(UserError, match=r"rank0.jsonl:2 is damaged: not a line of a ledger"):
        list(read_ledger(path))


def test_a_ledger_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "rank0.jsonl").mkdir()
    with pytest.raises(UserError, match=r"rank0.jsonl: cannot be read: Is a directory"):
        list(read_ledger(tmp_path / "rank0.jsonl"))
    with pytest.raises(UserError, match=r"rank0.jsonl: cannot be read: Is a directory"):
        is_cut_short(tmp_path / "rank0.jsonl")


@pytest.mark.parametrize(
    ("content", "cut"), [("", False), ("\n", False), (BATCH, False), ("{", True), (BATCH[:-1], True)]
)
def test_a_last_line_without_an_end_is_cut_short(tmp_path, content, cut):
    (tmp_path / "rank0.jsonl").write_text(content)
    assert is_cut_short(tmp_path / "rank0.jsonl") == cut


def test_files_by_rank(tmp_path):
    for name in ("rank0.jsonl", "rank11.jsonl", "rank2.jsonl.bak", "rankx.jsonl"):
        (tmp_path / name).touch()
    assert ledger_files(tmp_path) == {0: tmp_path / "rank0.jsonl", 11: ledger_path(tmp_path, 11)}
    assert ledger_files(tmp_path / "none") == {}
