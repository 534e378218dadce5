"""Ids of text and back, byte lengths of ids, special tokens."""

import pickle
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from muse_lightning.data.token_bytes import byte_level_alphabet
from muse_lightning.data.tokenizer import HuggingFaceTokenizer, SpecialTokens, load_tokenizer
from muse_lightning.errors import UserError

TEXTS = [
    "def f(x):\n    return x  # caf\u00e9 \u6f22\u5b57 \U0001f600\n",
    "<|endoftext|> in a text is text, and <|file_sep|> too\n",
    "  leading, trailing  ",
    "",
]
SPECIAL = SpecialTokens()


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return tokenizer


def sentencepiece_like(prepend: bool) -> tokenizers.Tokenizer:
    """As Llama 2's: a normalizer that marks spaces, bytes as <0x0A> for what has no token."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for token in ["\u2581", "d", "e", "f", "x", "\u00e9", "de", "\u2581\u2581"]:
        vocab[token] = len(vocab)
    merges = [("d", "e"), ("\u2581", "\u2581")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *steps] if prepend else steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prepend else [])
    )
    return tokenizer


def saved(tokenizer: tokenizers.Tokenizer, folder: Path) -> str:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(params=["bytes", "byte-level", "byte-level-added", "sentencepiece"])
def any_tokenizer(request, tmp_path):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "sentencepiece":
        return load_tokenizer(saved(sentencepiece_like(prepend=False), tmp_path))
    special = list(astuple(SPECIAL)) if request.param == "byte-level" else ["<|endoftext|>"]
    return load_tokenizer(saved(byte_level(special), tmp_path))


def test_text_comes_back(any_tokenizer):
    ids = any_tokenizer.encode([text.encode() for text in TEXTS])
    assert [any_tokenizer.decode(row) for row in ids] == TEXTS
    assert all(row.dtype == any_tokenizer.dtype == np.uint16 for row in ids)


def test_texts_of_tokens_make_the_text(any_tokenizer):
    for text in TEXTS:
        (ids,) = any_tokenizer.encode([text.encode()])
        assert b"".join(any_tokenizer.token_texts[i] for i in ids) == text.encode()
        assert any_tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_every_byte_has_its_character_in_byte_level_bpe():
    """Against the library's decoder, on every character that UTF-8 writes with one or two bytes."""
    tokenizer = HuggingFaceTokenizer(byte_level([]))
    text = "".join(map(chr, range(0x800)))
    (ids,) = tokenizer.encode([text.encode()])
    assert b"".join(tokenizer.token_texts[i] for i in ids) == text.encode()
    assert byte_level_alphabet().keys() == set(pre_tokenizers.ByteLevel.alphabet())


def test_special_tokens_are_ids_of_their_own(any_tokenizer):
    special_ids = list(any_tokenizer.special_ids.values())
    assert len(set(special_ids)) == 3
    assert max(special_ids) < any_tokenizer.vocab_size == len(any_tokenizer.token_bytes)
    assert any_tokenizer.token_bytes[special_ids].tolist() == [0, 0, 0]
    assert [any_tokenizer.decode([i]) for i in special_ids] == list(astuple(SPECIAL))
    # A special token's name in a source file is text.
    (ids,) = any_tokenizer.encode(["".join(astuple(SPECIAL)).encode()])
    assert not set(special_ids) & set(ids.tolist())


def test_pickle_keeps_everything(any_tokenizer):
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    texts = [text.encode() for text in TEXTS]
    for a, b in zip(copy.encode(texts), any_tokenizer.encode(texts), strict=True):
        np.testing.assert_array_equal(a, b)
    assert copy.sha256 == any_tokenizer.sha256
    assert copy.special_ids == any_tokenizer.special_ids


def test_stored_copy_is_the_same_tokenizer(any_tokenizer, tmp_path):
    text = any_tokenizer.to_json()
    if text is None:
        assert load_tokenizer("bytes").sha256 == any_tokenizer.sha256
    else:
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "tokenizer.json").write_text(text)
        assert load_tokenizer(str(tmp_path / "copy")).sha256 == any_tokenizer.sha256


def test_bytes_ids():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(["a\u00e9".encode()])[0].tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.special_ids == {"repo_name": 256, "file_sep": 257, "end": 258}
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([0xC3, 256, 97]) == "\ufffd<|repo_name|>a"
    # Names that are not UTF-8 stay the bytes they are.
    assert tokenizer.encode([b"\xe9"])[0].tolist() == [0xE9]


def test_a_name_that_is_not_utf8_reaches_any_tokenizer(any_tokenizer):
    assert len(any_tokenizer.encode([b"caf\xe9"])[0]) > 0


def test_special_tokens_of_the_file_keep_their_ids_and_missing_ones_are_added(tmp_path):
    raw = byte_level(["<|endoftext|>"])
    tokenizer = load_tokenizer(saved(raw, tmp_path))
    assert tokenizer.special_ids["end"] == raw.token_to_id("<|endoftext|>") == 0
    assert tokenizer.vocab_size == raw.get_vocab_size() + 2
    renamed = load_tokenizer(saved(raw, tmp_path), SpecialTokens(end="<eos>"))
    assert renamed.special_ids["end"] >= raw.get_vocab_size()
    assert renamed.sha256 != tokenizer.sha256
    assert load_tokenizer("bytes", SpecialTokens(end="<eos>")).sha256 != load_tokenizer("bytes").sha256


def test_names_that_the_file_holds_as_ordinary_added_tokens_become_special(tmp_path):
    """As in Qwen2.5-Coder's tokenizer.json."""
    raw = byte_level(["<|endoftext|>"])
    raw.add_tokens(["<|file_sep|>", "<tool>"])
    tokenizer = load_tokenizer(saved(raw, tmp_path))
    assert tokenizer.special_ids["file_sep"] == raw.token_to_id("<|file_sep|>")
    assert tokenizer.token_bytes[tokenizer.special_ids["file_sep"]] == 0
    (ids,) = tokenizer.encode([b"<|file_sep|><tool>"])
    assert tokenizer.special_ids["file_sep"] not in ids
    assert raw.token_to_id("<tool>") in ids
    assert tokenizer.token_bytes[ids].sum() == len("<|file_sep|><tool>")


def test_options_of_the_file_that_would_change_documents_are_off(tmp_path):
    raw = byte_level(list(astuple(SPECIAL)))
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 2)])
    tokenizer = load_tokenizer(saved(raw, tmp_path))
    ids = tokenizer.encode([text.encode() for text in TEXTS[:2]])
    assert [tokenizer.decode(row) for row in ids] == TEXTS[:2]


def test_known_byte_lengths_of_sentencepiece_tokens(tmp_path):
    tokenizer = HuggingFaceTokenizer(sentencepiece_like(prepend=True))
    vocab = sentencepiece_like(prepend=True).get_vocab()
    expected = {"<unk>": 0, "<0x0A>": 1, "\u2581": 1, "\u2581\u2581": 2, "de": 2, "\u00e9": 2}
    assert {token: tokenizer.token_bytes[vocab[token]] for token in expected} == expected
    # Such a tokenizer puts a space before each text; it counts.
    (ids,) = tokenizer.encode([b"de"])
    assert tokenizer.token_bytes[ids].sum() == 3


def test_metaspace_and_added_tokens(tmp_path):
    raw = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581", -2.0)], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.add_tokens(["n\u00e9w"])
    tokenizer = HuggingFaceTokenizer(raw)
    assert tokenizer.token_bytes.tolist() == [0, 4, 1, 4, 0, 0, 0]


def test_large_vocabularies_are_stored_in_32_bits():
    vocab = {f"t{i}": i for i in range((1 << 16) + 1 - 3)}
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    raw.decoder = decoders.Metaspace()
    assert HuggingFaceTokenizer(raw).dtype is np.int32
    del vocab[f"t{len(vocab) - 1}"]
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    raw.decoder = decoders.Metaspace()
    assert HuggingFaceTokenizer(raw).dtype is np.uint16


def test_bad_tokenizers_are_one_line(tmp_path):
    def message(name: str) -> str:
        with pytest.raises(UserError) as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message(str(tmp_path / "none.json")).endswith("none.json; give 'bytes' or the path of a tokenizer.json")
    assert "tokenizer.json" in message("byte")
    (tmp_path / "bad.json").write_text("{\n]")
    assert "bad.json is not a tokenizer.json" in message(str(tmp_path / "bad.json"))
    raw = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    assert "its decoder (WordPiece) gives no byte length" in message(saved(raw, tmp_path))


@pytest.mark.parametrize("arguments", [{"end": "<|file_sep|>"}, {"repo_name": ""}])
def test_special_tokens_differ(arguments):
    with pytest.raises(UserError, match="three different names expected"):
        SpecialTokens(**arguments)
