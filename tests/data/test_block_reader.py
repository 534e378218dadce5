"""Blocks and their documents against a plain reading of the chunk files; damaged chunks; files that litdata alone
also reads."""

import gc
import json
import os
import random
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import litdata
import numpy as np
import pytest
from litdata.streaming import Cache
from litdata.streaming.writer import BinaryWriter

from muse_lightning.data import TokenDataModule
from muse_lightning.data.block_reader import Chunk, read_block
from muse_lightning.data.card import ChunkEntry, read_card
from muse_lightning.errors import UserError
from muse_lightning.files import sha256_bytes


def expected_blocks(data: TokenDataModule, split: str) -> list[tuple[list[int], list[int]]]:
    """Tokens and document starts of every block, by walking through the bytes."""
    blocks = []
    for chunk in data.card.splits[split].chunks:
        raw = (data.dataset / split / chunk.filename).read_bytes()
        tokens = np.frombuffer(raw, dtype=np.uint16, offset=8 + 4 * chunk.documents).tolist()
        for first in range(0, len(tokens) - data.seq_len, data.seq_len + 1):
            block = tokens[first : first + data.seq_len + 1]
            # With the bytes tokenizer a document begins where its <|repo_name|> is.
            blocks.append((block, [position for position, token in enumerate(block) if token == 256]))
    return blocks


@pytest.mark.parametrize("seq_len", [1, 64, 1000, 2900])
def test_blocks_of_any_length(make_data, seq_len):
    data = make_data(seq_len=seq_len, batch_size=1)
    data.prepare_data()
    data.setup("fit")
    expected = expected_blocks(data, "train")
    data.predict_split = "train"
    found = [(block.tokens.tolist(), block.starts.tolist()) for block in data.predict_dataloader().blocks()]
    assert found == expected
    assert len(expected) == sum(chunk.tokens // (seq_len + 1) for chunk in data.card.splits["train"].chunks)

    entry = data.card.splits["train"]
    for index in range(0, len(expected), 1 + len(expected) // 100):
        block = read_block(data.dataset / "train", entry, data.card.dtype, seq_len, index)
        assert (block.tokens.tolist(), block.starts.tolist()) == expected[index]
    with pytest.raises(IndexError):
        read_block(data.dataset / "train", entry, data.card.dtype, seq_len, len(expected))


def test_litdata_alone_reads_it(make_data):
    data = make_data()
    data.prepare_data()
    dataset = litdata.StreamingDataset(
        str(data.dataset / "train"), item_loader=litdata.TokensLoader(block_size=65), shuffle=False
    )
    assert [block.tolist() for block in dataset] == [tokens for tokens, _ in expected_blocks(data, "train")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_bit_is_one_line(make_data, num_workers):
    data = make_data(num_workers=num_workers)
    data.prepare_data()
    chunk = data.dataset / "train" / "chunk-1-0.bin"
    content = bytearray(chunk.read_bytes())
    content[-7] ^= 1
    chunk.write_bytes(content)
    data.setup("fit")
    with pytest.raises(UserError) as error:
        list(data.train_dataloader())
    assert str(error.value).startswith(f"data chunk {chunk} is damaged: its SHA-256 is ")
    assert "\n" not in str(error.value)
    begin = time.monotonic()
    del error
    gc.collect()
    assert time.monotonic() - begin < 4, "workers were waited for"
    with pytest.raises(UserError, match=r"chunk-1-0.bin is damaged"):
        list(data.training_blocks())


@pytest.mark.parametrize(
    ("damage", "message"), [("truncate", r"has 100 bytes instead of \d+"), ("remove", "is missing")]
)
def test_a_truncated_or_missing_chunk_is_found_at_set_up(make_data, damage, message):
    make_data().prepare_data()
    data = make_data(sources=None)
    chunk = data.dataset / "train" / "chunk-1-0.bin"
    if damage == "truncate":
        os.truncate(chunk, 100)
    else:
        chunk.unlink()
    data.prepare_data()
    with pytest.raises(UserError, match=rf"data chunk .*chunk-1-0.bin {message}; prepare the dataset again"):
        data.setup("fit")
    # And when it happens after set-up:
    with pytest.raises(UserError, match=r"data chunk .*chunk-1-0.bin"):
        list(data.train_dataloader())


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_dataset_that_would_unpickle_is_refused_before_it_is_opened(make_data, tmp_path):
    data = make_data()
    data.prepare_data()
    folder = data.dataset / "val"
    for path in folder.iterdir():
        path.unlink()
    writer = BinaryWriter(str(folder), chunk_bytes=1 << 20)
    writer.add_item(0, Bomb(str(tmp_path / "exploded")))
    writer.done()
    writer.merge()
    # The file works on an unguarded loader.
    cache = Cache(str(folder), chunk_bytes=1)
    assert cache[0] is not None
    assert (tmp_path / "exploded").exists()
    (tmp_path / "exploded").unlink()
    # Even with a card that agrees with it, it is refused by ours.
    card_path = data.dataset / "dataset.json"
    card = json.loads(card_path.read_text())
    index = (folder / "index.json").read_bytes()
    (chunk,) = json.loads(index)["chunks"]
    content = (folder / chunk["filename"]).read_bytes()
    entry = card["splits"]["val"]
    entry["index_sha256"] = sha256_bytes(index)
    entry["chunks"] = [
        {
            "filename": chunk["filename"],
            "sha256": sha256_bytes(content),
            "size_bytes": len(content),
            "tokens": 1000,
            "documents": 1,
        }
    ]
    card_path.write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"index.json: data format \['pickle'\] refused; only plain tokens"):
        make_data(sources=None).setup("validate")
    assert not (tmp_path / "exploded").exists()


def test_an_index_that_the_card_does_not_describe_is_refused(make_data):
    make_data().prepare_data()
    data = make_data(sources=None)
    index = data.dataset / "train" / "index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(UserError, match=r"index.json is not the file that dataset.json describes"):
        data.setup("fit")
    index.unlink()
    with pytest.raises(UserError, match=r"index.json is missing or damaged"):
        data.setup("fit")


@pytest.fixture
def chunk(prepared, tmp_path) -> tuple[Path, ChunkEntry, str]:
    """A copy of a chunk file, its entry and the type of its tokens."""
    card = read_card(prepared)
    entry = card.splits["train"].chunks[0]
    return Path(shutil.copy(prepared / "train" / entry.filename, tmp_path)), entry, card.dtype


def test_a_thousand_flipped_bits_are_a_thousand_refusals(chunk):
    path, entry, dtype = chunk
    content = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        bit = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            Chunk(path, entry, dtype)
        except UserError as error:
            refused += str(error).startswith(f"data chunk {path} is damaged: its SHA-256 is ")
    assert refused == 1000
    path.write_bytes(content)
    assert Chunk(path, entry, dtype).tokens.shape == (entry.tokens,)


@pytest.mark.parametrize("damage", ["zeros", "zeros of the same length", "truncated", "empty", "longer"])
def test_other_damage_is_named(chunk, damage):
    path, entry, dtype = chunk
    content = path.read_bytes()
    path.write_bytes(
        {
            "zeros": bytes(4096),
            "zeros of the same length": bytes(len(content)),
            "truncated": content[:-2],
            "empty": b"",
            "longer": content + b"x",
        }[damage]
    )
    with pytest.raises(UserError, match=rf"data chunk {re.escape(str(path))} is damaged: its SHA-256"):
        Chunk(path, entry, dtype)


@pytest.mark.parametrize("field", ["tokens", "documents"])
def test_a_card_that_contradicts_the_file_is_refused(chunk, field):
    path, entry, dtype = chunk
    with pytest.raises(UserError, match=r"does not hold what dataset.json says"):
        Chunk(path, replace(entry, **{field: getattr(entry, field) + 1}), dtype)
