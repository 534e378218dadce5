"""`muse data inspect`: what it prints."""

import pytest

from muse_lightning.data.inspection import inspect
from muse_lightning.errors import UserError


@pytest.fixture
def data(make_data, repositories):
    (repositories / "repo0" / "x.bin").write_bytes(b"\0")
    data = make_data(max_document_bytes=100_000)
    data.prepare_data()
    return data


def test_card(data, capsys):
    inspect(data.dataset)
    text = capsys.readouterr().out
    card = data.card
    assert card.fingerprint[:12] in text
    assert "tokenizer bytes: 259 ids, stored as uint16" in text
    assert "Folders(path=" in text
    assert f"train: {card.splits['train'].documents} documents, {card.splits['train'].tokens:,} tokens" in text
    assert f"files: {card.files} written; left out: binary 1" in text
    assert "max_file_bytes 1000000" in text
    assert "max_document_bytes 100000" in text
    assert "block" not in text


def test_every_block_decodes_to_the_documents_in_it(data, capsys):
    text = ""
    for block in range(card_blocks := sum(chunk.tokens // 501 for chunk in data.card.splits["train"].chunks)):
        inspect(data.dataset, block=block, seq_len=500)
        printed = capsys.readouterr().out
        assert f"block {block} of {card_blocks} in train: 501 tokens" in printed
        text += printed
    assert text.count("document begins ---\n<|repo_name|>repo") == text.count("document begins") > 1
    assert text.count("--- tokens 0 to ") == card_blocks


def test_boundaries_by_hand(data, capsys):
    data.predict_split = "val"
    blocks = list(data.predict_dataloader().blocks())
    row = next(i for i, block in enumerate(blocks) if (block.starts > 0).any())
    tokens = blocks[row].tokens.numpy()
    (position,) = blocks[row].starts[blocks[row].starts > 0].tolist()
    inspect(data.dataset, split="val", block=row, seq_len=data.seq_len)
    printed = capsys.readouterr().out
    before, after = (data.tokenizer.decode(part) for part in (tokens[:position], tokens[position:]))
    assert f"--- tokens 0 to {position - 1}: document continued from the block before ---\n{before}\n" in printed
    assert f"--- tokens {position} to {data.seq_len}: document begins ---\n{after}\n" in printed


def test_only_the_chunk_of_the_block_is_read(data, capsys):
    first, *_ = data.card.splits["train"].chunks
    (data.dataset / "train" / first.filename).unlink()
    count = sum(chunk.tokens // 501 for chunk in data.card.splits["train"].chunks)
    inspect(data.dataset, block=count - 1, seq_len=500)
    assert f"block {count - 1} of {count}" in capsys.readouterr().out
    with pytest.raises(UserError, match=first.filename):
        inspect(data.dataset, block=0, seq_len=500)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": -1}, r"block: -1 found; split 'train' has \d+ blocks"),
        ({"block": 10**9}, r"block: 1000000000 found"),
        ({"block": 0, "split": "tset"}, r"split 'tset': not in this dataset; it has train, val"),
    ],
)
def test_mistakes_are_one_line(data, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        inspect(data.dataset, **arguments)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="is not a prepared dataset"):
        inspect(tmp_path)
