"""Blocks of a dataset: which, and what their labels stand for."""

from pathlib import Path

import pytest
import tokenizers

from muse_lightning.compare.blocks import Blocks, check_tokenizer, read_blocks
from muse_lightning.data.batches import IGNORED_LABEL
from muse_lightning.data.tokenizer import ByteTokenizer, SpecialTokens, load_tokenizer
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


def test_one_more_that_is_not_among_them(dataset: Path) -> None:
    everything = read_blocks(dataset, "val", SEQ_LEN, 10**6, document_mask=True, vocab_size=264)
    total = len(everything.batches)
    for count, other in ((3, 0), (total - 1, total - 1 - total // 2), (total, 0)):
        found = read_blocks(dataset, "val", SEQ_LEN, count, document_mask=True, vocab_size=264)
        assert (found.other_index in found.indices) == (count == total)
        assert found.other_index == other
        assert found.other["input_ids"].equal(everything.batches[other]["input_ids"])


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
        read_blocks(dataset, **arguments)


class TestTokenizer:
    """Data must have been prepared with the model's tokenizer: by what ids stand for, not by file."""

    @pytest.fixture
    def trained(self, dataset: Path, tmp_path: Path) -> Path:
        """A tokenizer.json of byte-level BPE."""
        tokenizer = tokenizers.ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(["def index(self): return value"] * 9, vocab_size=270)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path / "tokenizer.json"

    def test_the_same(self, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        check_tokenizer(dataset, ByteTokenizer(), "model")
        check_tokenizer(dataset, ByteTokenizer(SpecialTokens("<a>", "<b>", "<c>")), "model")
        assert capsys.readouterr().err == ""

    def test_another(self, dataset: Path, trained: Path) -> None:
        message = (
            f"data: {dataset} was prepared with another tokenizer than model has: id 0 stands for b'\\\\x00' there"
        )
        with pytest.raises(UserError, match=message):
            check_tokenizer(dataset, load_tokenizer(str(trained)), "model")

    def test_none(self, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
        check_tokenizer(dataset, None, "model")
        assert "model has no tokenizer" in capsys.readouterr().err
