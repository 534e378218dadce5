"""What is written, that it is the same on any number of workers, and when it is written again."""

import json
import os
import shutil
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from muse_lightning.data import TokenDataModule, assembly
from muse_lightning.data.block_reader import document_starts
from muse_lightning.data.card import read_card
from muse_lightning.data.filters import Filters
from muse_lightning.data.sources import Folders
from muse_lightning.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def documents_of(dataset: Path, split: str) -> list[np.ndarray]:
    """Every document of a split, straight from the chunk files."""
    card = read_card(dataset)
    found = []
    for chunk in card.splits[split].chunks:
        data = (dataset / split / chunk.filename).read_bytes()
        count = int.from_bytes(data[:4], "little")
        offsets = np.frombuffer(data[4 : 8 + 4 * count], dtype="<u4")
        found += [np.frombuffer(data[a:b], dtype=card.dtype) for a, b in pairwise(offsets)]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_document_format_is_qwen_coders(tmp_path):
    write(tmp_path / "code" / "lib" / "src" / "a.py", "x = 1\n")
    write(tmp_path / "code" / "lib" / "b.md", "# t\u00e9xt")
    write(tmp_path / "code" / "lib" / "z.bin", b"\0\1")
    data = TokenDataModule(
        tmp_path / "set", [Folders(tmp_path / "code")], seq_len=8, batch_size=1, val_fraction=0, file_order="path"
    )
    data.prepare_data()
    (document,) = documents_of(tmp_path / "set", "train")
    expected = "<|repo_name|>lib\n<|file_sep|>b.md\n# t\u00e9xt\n<|file_sep|>src/a.py\nx = 1\n<|endoftext|>"
    assert data.tokenizer.decode(document) == expected
    assert document[[0, -1]].tolist() == [256, 258]
    card = read_card(tmp_path / "set")
    split = card.splits["train"]
    assert (split.documents, split.tokens, card.files) == (1, len(document), 2)
    text = expected
    for special in astuple(data.tokenizer.special_tokens):
        text = text.replace(special, "")
    assert split.text_bytes == len(text.encode())
    assert card.skipped_files == {"binary": 1}


def test_every_reason_is_counted_and_the_rest_is_there(make_data, repositories, tmp_path):
    kept = {path.name for path in repositories.rglob("*.py")}
    for name, content in {
        "binary": b"\0",
        "generated.py": "# @generated\nx\n",
        "minified.js": "x" * 2000,
        "oversize.txt": "x\n" * 60_000,
        "undecodable.c": b"caf\xe9",
        "empty.py": "\n",
    }.items():
        write(repositories / "repo0" / name, content)
    (repositories / "repo0" / "link").symlink_to(tmp_path)
    data = make_data(filters=Filters(max_file_bytes=100_000))
    data.prepare_data()
    assert data.card.skipped_files == dict.fromkeys(
        ("binary", "empty", "generated", "minified", "oversize", "symlink", "undecodable"), 1
    )
    assert data.card.inputs["filters"]["max_file_bytes"] == 100_000
    assert data.card.files == len(list(repositories.rglob("*.py"))) - 2
    text = "".join(data.tokenizer.decode(d) for split in data.card.splits for d in documents_of(data.dataset, split))
    assert all(name in text for name in kept)


def test_names_that_are_not_utf8_survive(tmp_path):
    write(tmp_path / "code" / "r" / os.fsdecode(b"caf\xe9.py"), "x = 1\n")
    data = TokenDataModule(tmp_path / "set", [Folders(tmp_path / "code")], seq_len=8, batch_size=1, val_fraction=0)
    data.prepare_data()
    (document,) = documents_of(tmp_path / "set", "train")
    assert b"caf\xe9.py\n" in bytes(document[document < 256].astype(np.uint8))
    data.prepare_data()


def test_splits_hold_whole_repositories(make_data):
    data = make_data(test_fraction=0.2, max_document_bytes=1500)
    data.prepare_data()
    names = {}
    for split in ("train", "val", "test"):
        texts = [data.tokenizer.decode(document) for document in documents_of(data.dataset, split)]
        assert all(text.startswith("<|repo_name|>repo") and text.endswith("<|endoftext|>") for text in texts)
        assert all(text.count("<|endoftext|>") == 1 for text in texts)
        names[split] = {text[len("<|repo_name|>") :].partition("\n")[0] for text in texts}
        assert len(texts) == data.card.splits[split].documents
    assert sorted(name for found in names.values() for name in found) == [f"repo{i}" for i in range(8)]
    assert sum(split.documents for split in data.card.splits.values()) > 8


def test_the_card_describes_the_chunks(make_data):
    data = make_data()
    data.prepare_data()
    assert len(data.card.splits["train"].chunks) > 1
    for name, split in data.card.splits.items():
        lengths = np.array([len(document) for document in documents_of(data.dataset, name)])
        assert split.tokens == lengths.sum() == sum(chunk.tokens for chunk in split.chunks)
        assert split.documents == len(lengths) == sum(chunk.documents for chunk in split.chunks)
        for limit, share in split.long_document_share.items():
            assert share == pytest.approx(lengths[lengths >= int(limit)].sum() / lengths.sum(), abs=1e-4)
        for chunk in split.chunks:
            assert (data.dataset / name / chunk.filename).stat().st_size == chunk.size_bytes
            starts = document_starts(data.dataset / name / chunk.filename, 2)
            assert len(starts) == chunk.documents
            assert starts[0] == 0
    assert data.card.token_bytes == [1] * 256 + [0] * 3


@pytest.mark.multi_process
def test_the_same_bytes_on_any_number_of_workers(make_data, tmp_path):
    one = make_data(dataset=tmp_path / "one")
    two = make_data(dataset=tmp_path / "two", prepare_workers=2)
    one.prepare_data()
    two.prepare_data()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(one.card.splits["train"].chunks) > 2


def test_the_content_follows_the_seed_and_nothing_else(make_data, repositories, tmp_path):
    def fingerprint(name: str, **arguments) -> str:
        data = make_data(dataset=tmp_path / name, **arguments)
        data.prepare_data()
        return data.card.fingerprint

    first = fingerprint("a")
    assert fingerprint("a2", seed=7, batch_size=3, seq_len=32) == first
    assert fingerprint("b", prepare_seed=1) != first
    assert fingerprint("c", file_order="path") != first
    assert fingerprint("d", max_documents=4) != first
    # The same files at another place and time are the same data.
    shutil.copytree(repositories, tmp_path / "copy")
    assert fingerprint("e", sources=[Folders(tmp_path / "copy")]) == first


def test_huggingface_tokenizer_is_stored_beside_its_ids(make_data, tmp_path):
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.save(str(tmp_path / "tokenizer.json"))
    data = make_data(tokenizer=str(tmp_path / "tokenizer.json"))
    data.prepare_data()
    plain = make_data(dataset=tmp_path / "bytes")
    plain.prepare_data()
    # No merges: one token per byte, so that both hold the same text.
    assert data.card.splits["train"].tokens == plain.card.splits["train"].tokens
    for a, b in zip(documents_of(data.dataset, "val"), documents_of(plain.dataset, "val"), strict=True):
        assert data.tokenizer.decode(a) == plain.tokenizer.decode(b)
    stored = make_data(sources=None, tokenizer=str(data.dataset))
    assert stored.card.fingerprint == data.card.fingerprint


class TestReuse:
    """A second call, after some change."""

    @pytest.fixture
    def built(self, make_data, capsys):
        data = make_data()
        data.prepare_data()
        capsys.readouterr()
        return data

    def is_rebuilt(self, built: TokenDataModule, again: TokenDataModule) -> bool:
        before = (built.dataset / "dataset.json").stat().st_ino
        again.prepare_data()
        return (built.dataset / "dataset.json").stat().st_ino != before

    def test_nothing_changed(self, built, make_data, capsys):
        assert not self.is_rebuilt(built, make_data(seq_len=32, batch_size=1, seed=3, num_workers=1))
        assert capsys.readouterr().err == f"data: {built.dataset} is up to date\n"

    def test_workers_are_no_change(self, built, make_data):
        assert not self.is_rebuilt(built, make_data(prepare_workers=2))

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            ({"prepare_seed": 5}, "seed 0 -> 5"),
            ({"val_fraction": 0.3}, "fractions.val 0.2 -> 0.3"),
            ({"file_order": "path"}, "file_order shuffle -> path"),
            ({"max_documents": 6}, "limits.max_documents None -> 6"),
            ({"filters": Filters(max_line_bytes=99)}, "filters.max_line_bytes 1000 -> 99"),
            ({"chunk_bytes": 9000}, "chunk_bytes 8000 -> 9000"),
        ],
    )
    def test_changed_arguments(self, built, make_data, capsys, arguments, line):
        assert self.is_rebuilt(built, make_data(**arguments))
        assert f"{built.dataset} is prepared again: {line}\n" in capsys.readouterr().err

    @pytest.mark.parametrize("change", ["content", "added", "removed"])
    def test_changed_files(self, built, make_data, repositories, capsys, change):
        file = next(repositories.rglob("*.py"))
        if change == "content":
            status = file.stat()
            file.write_bytes(file.read_bytes()[:-2] + b"#\n")
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif change == "added":
            write(repositories / "repo0" / "new.py", "x = 1\n")
        else:
            file.unlink()
        assert self.is_rebuilt(built, make_data())
        assert "is prepared again: files changed\n" in capsys.readouterr().err

    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_damaged_chunks(self, built, make_data, capsys, damage):
        chunk = built.dataset / "train" / "chunk-1-0.bin"
        if damage == "missing":
            chunk.unlink()
        else:
            os.truncate(chunk, 100)
        assert self.is_rebuilt(built, make_data())
        assert f"prepared again: {chunk} " in capsys.readouterr().err

    def test_another_format_version(self, built, make_data, capsys):
        path = built.dataset / "dataset.json"
        card = json.loads(path.read_text())
        card["format_version"] = card["inputs"]["format_version"] = 0
        path.write_text(json.dumps(card))
        assert self.is_rebuilt(built, make_data())
        assert "format_version 0 -> 2" in capsys.readouterr().err

    def test_a_failed_build_leaves_the_old_dataset(self, built, make_data, monkeypatch):
        before = contents(built.dataset)

        def fail(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(assembly, "_write_index", fail)
        with pytest.raises(KeyboardInterrupt):
            make_data(prepare_seed=9).prepare_data()
        assert contents(built.dataset) == before
        # What was finished is kept for the next call, and goes with its success.
        assert [path.name for path in built.dataset.parent.glob(".dataset.*")] == [".dataset.staging"]
        monkeypatch.undo()
        assert self.is_rebuilt(built, make_data(prepare_seed=9))
        assert list(built.dataset.parent.glob(".dataset.*")) == []


@pytest.mark.parametrize("content", [b"\0", b"\xff", b""], ids=["binary", "undecodable", "empty"])
def test_nothing_left_is_one_line_and_writes_nothing(tmp_path, content):
    write(tmp_path / "code" / "r" / "a.py", content)
    data = TokenDataModule(tmp_path / "set", [Folders(tmp_path / "code")], seq_len=8, batch_size=1, val_fraction=0)
    with pytest.raises(
        UserError, match=r"nothing is left of 1 listed repositories .* \w+ 1; loosen data.filters"
    ) as error:
        data.prepare_data()
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_a_split_without_files_is_named(tmp_path):
    write(tmp_path / "code" / "good" / "a.py", "x = 1\n" * 100)
    write(tmp_path / "code" / "bad" / "a.bin", b"\0")
    data = TokenDataModule(tmp_path / "set", [Folders(tmp_path / "code")], seq_len=8, batch_size=1, val_fraction=0.1)
    message = r"1 repositories cannot be split into train and val; .*raise data.max_bytes or .*data.val_fraction to 0"
    with pytest.raises(UserError, match=message):
        data.prepare_data()


def test_a_folder_that_is_no_dataset_is_never_replaced(make_data, tmp_path):
    write(tmp_path / "dataset" / "thesis.tex", "precious")
    with pytest.raises(UserError, match=r"data.dataset: .* exists and is not a prepared dataset; give a new folder"):
        make_data().prepare_data()
    assert (tmp_path / "dataset" / "thesis.tex").read_text() == "precious"


def test_an_empty_folder_is_filled(make_data, tmp_path):
    (tmp_path / "dataset").mkdir()
    make_data().prepare_data()
    assert (tmp_path / "dataset" / "dataset.json").exists()
