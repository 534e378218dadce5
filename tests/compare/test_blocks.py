"""Blocks of a dataset: which, and what their labels stand for."""

from pathlib import Path

import pytest

from muse_lightning.compare.blocks import Blocks, read_blocks
from muse_lightning.data.batches import IGNORED_LABEL
from muse_lightning.errors import UserError
from tests.compare.conftest import SEQ_LEN


def test_they_are_spread_over_the_split(dataset: Path) -> None:
    everything = read_blocks(dataset, "val", SEQ_LEN, 10**6, document_mask=True, vocab_size=264)
    few = read_blocks(dataset, "val", SEQ_LEN, 3, document_mask=True, vocab_size=264)
    total = len(everything.batches)
    assert list(everything.indices) == list(range(total))
    assert list(few.indices) == [total // 6, total // 2, total * 5 // 6]
    for index, batch in zip(few.indices, few.batches, strict=True):
        assert batch["input_ids"].equal(everything.batches[index]["input_ids"])


def test_labels_and_their_bytes(blocks: Blocks) -> None:
    for batch, labels, text_bytes in zip(blocks.batches, blocks.labels(), blocks.text_bytes(), strict=True):
        ids = [i for i in batch["labels"].flatten().tolist() if i != IGNORED_LABEL]
        assert labels == len(ids)
        assert text_bytes == sum(i < 256 for i in ids)  # the byte tokenizer's specials stand for no text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "split 'dev': not in this dataset"),
        ({"seq_len": 10**6}, "seq_len: 1000000 found; split 'val'"),
        ({"vocab_size": 200}, "tokenizer of 259 ids, the model has 200"),
    ],
)
def test_mistakes(dataset: Path, change: dict[str, object], message: str) -> None:
    arguments = {"split": "val", "seq_len": SEQ_LEN, "count": 1, "document_mask": True, "vocab_size": 264, **change}
    with pytest.raises(UserError, match=message):
        read_blocks(dataset, **arguments)  # type: ignore[arg-type]
