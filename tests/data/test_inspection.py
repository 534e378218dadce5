"""`muse data inspect`: what it prints."""

import os

import pytest

from muse_lightning.data import TokenDataModule
from muse_lightning.data.filters import Filters
from muse_lightning.data.inspection import inspect
from muse_lightning.data.length_histogram import document_lengths
from muse_lightning.errors import UserError
from tests.data.memory_source import MemorySource, MemoryUnit, text


@pytest.fixture
def data(make_data, repositories):
    (repositories / "repo0" / "x.bin").write_bytes(b"\0")
    data = make_data(max_document_bytes=100_000)
    data.prepare_data()
    return data


def test_card(data, capsys):
    inspect(data.dataset)
    printed = capsys.readouterr().out
    card = data.card
    assert card.fingerprint[:12] in printed
    assert "tokenizer bytes: 259 ids, stored as uint16" in printed
    source = card.sources[0]
    assert "source Folders(path=" in printed
    assert (
        f"{source['units']} units read, {source['documents']} documents, {card.files} files, {source['bytes']:,}"
        in printed
    )
    assert "languages by bytes: python 100.0%" in printed
    assert "licences by bytes: unknown 100.0%" in printed
    assert f"train: {card.splits['train'].documents} documents, {card.splits['train'].tokens:,} tokens" in printed
    assert f"files: {card.files} written; left out: binary 1" in printed
    assert "max_file_bytes 1000000" in printed
    assert "max_document_bytes 100000" in printed
    assert "block" not in printed


def test_every_block_decodes_to_the_documents_in_it(data, capsys):
    found = ""
    for block in range(card_blocks := sum(chunk.tokens // 501 for chunk in data.card.splits["train"].chunks)):
        inspect(data.dataset, block=block, seq_len=500)
        printed = capsys.readouterr().out
        assert f"block {block} of {card_blocks} in train: 501 tokens" in printed
        found += printed
    assert found.count("document begins ---\n<|repo_name|>repo") == found.count("document begins") > 1
    assert found.count("--- tokens 0 to ") == card_blocks


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


def test_damage_revisions_and_dropped_documents(tmp_path, capsys):
    units = [MemoryUnit("a", (("a", {"a.py": text(1, 900), "b.c": text(2, 100)}),), licence="MIT", revision="v1")]
    units += [MemoryUnit(os.fsdecode(b"b\xe9d"), (("b", {"b.py": b"x\n"}),), damaged="no end")]
    units += [MemoryUnit("c", (("c", {"c.py": b"x = 1\n"}),))]
    limits = {"min_document_tokens": 50, "val_fraction": 0}
    TokenDataModule(tmp_path / "set", [MemorySource(units)], seq_len=8, batch_size=1, **limits).prepare_data()
    inspect(tmp_path / "set")
    printed = capsys.readouterr().out
    assert "3 units read, 1 documents, 2 files, 1,000 bytes, 1 revisions\n  damaged: b\ufffdd: no end\n" in printed
    assert "documents left out for min_document_tokens: 1 (6 bytes)\n" in printed
    assert "languages by bytes: python 90.0%, c 10.0%\n" in printed
    assert "licences by bytes: MIT 100.0%\n" in printed


def test_histogram(data, capsys, tmp_path):
    inspect(data.dataset, histogram=tmp_path / "lengths.png")
    assert f"lengths of documents: {tmp_path / 'lengths.png'}" in capsys.readouterr().out
    content = (tmp_path / "lengths.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    inspect(data.dataset, histogram=tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == content
    for split, entry in data.card.splits.items():
        lengths = document_lengths(data.dataset, data.card, split)
        assert (len(lengths), lengths.sum(), lengths.min() > 0) == (entry.documents, entry.tokens, True)
    with pytest.raises(UserError, match=r"histogram: cannot write .*nowhere.*: No such file"):
        inspect(data.dataset, histogram=tmp_path / "nowhere" / "a.png")


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


class TestLeftOut:
    @pytest.fixture
    def dataset(self, make_data, tmp_path):
        same = text(1, 500)
        units = [
            MemoryUnit("a", (("a", {"x.py": same, "n.bin": b"\0", "b\udcff\n.py": b" "}),), licence="MIT"),
            MemoryUnit("b", (("b", {"src/x.py": same, "y.py": text(2, 600)}),), licence="MIT", skipped={"suffix": 7}),
            MemoryUnit("c", (("c", {"z.py": text(3, 300)}),), licence="GPL-3.0-only"),
            MemoryUnit("d", (("d", {"n.bin": b"\0"}),), damaged="no end"),
            *(MemoryUnit(f"e{i}", ((f"e{i}", {"x.py": text(10 + i, 400)}),), licence="MIT") for i in range(4)),
        ]
        filters = Filters(licences=["permissive"])
        data = make_data(sources=[MemorySource(units)], filters=filters, dataset=str(tmp_path / "set"))
        data.prepare_data()
        return data.dataset

    def lines(self, dataset, capsys, reason):
        capsys.readouterr()
        inspect(dataset, left_out=reason)
        return capsys.readouterr()

    def test_every_file_with_its_reason(self, dataset, capsys):
        out, err = self.lines(dataset, capsys, "all")
        repeated = {"duplicate\ta\tx.py", "duplicate\tb\tsrc/x.py"} & set(out.splitlines())
        assert len(repeated) == 1
        assert sorted(set(out.splitlines()) - repeated) == [
            "binary\ta\tn.bin",
            "empty\ta\tb\ufffd\ufffd.py",
            "licence\tc\tz.py",
        ]
        assert len(out.splitlines()) == 4
        assert err == "counted by sources, which do not look at such files: suffix 7\n"

    def test_one_reason(self, dataset, capsys):
        assert self.lines(dataset, capsys, "licence") == ("licence\tc\tz.py\n", "")
        assert self.lines(dataset, capsys, "suffix")[0] == ""
        with pytest.raises(UserError, match="left_out: 'minified' found; accepted: all, binary, duplicate, empty, lic"):
            inspect(dataset, left_out="minified")

    def test_a_list_that_is_missing_or_cut_is_one_line(self, dataset, capsys):
        path = dataset / "left_out.jsonl.gz"
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(UserError, match=r"left_out.jsonl.gz is damaged .*; prepare the dataset again"):
            inspect(dataset, left_out="all")
        path.unlink()
        with pytest.raises(UserError, match=r"set has no left_out.jsonl.gz: it was prepared by an earlier version"):
            inspect(dataset, left_out="all")
