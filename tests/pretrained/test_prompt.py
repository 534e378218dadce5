"""Where a prompt comes from, and its ids."""

import io
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from muse_lightning.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from muse_lightning.errors import UserError
from muse_lightning.pretrained.prompt import encode_prompt, opening_ids, read_prompt


class Terminal(io.StringIO):
    """Standard input of a person at a keyboard."""

    def isatty(self) -> bool:
        return True


def byte_level(opening: bool = False) -> HuggingFaceTokenizer:
    tokenizer = tokenizers.Tokenizer(
        models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<s>>"])
    if opening:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    return HuggingFaceTokenizer(tokenizer)


def test_a_prompt_from_each_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes(b"of a file\xff\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("über\n".encode())))
    assert read_prompt("given ü", None) == "given ü".encode()
    assert read_prompt(None, tmp_path / "p.txt") == b"of a file\xff\n"
    assert read_prompt(None, None) == "über\n".encode()


def test_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    for prompt, file, message in (
        ("", None, "prompt is empty; expected a text to continue"),
        (None, tmp_path / "empty", f"prompt_file {tmp_path}/empty is empty; expected a text to continue"),
        (None, tmp_path / "none", f"prompt_file: {tmp_path}/none cannot be read: No such file or directory"),
        (None, tmp_path, f"prompt_file: {tmp_path} cannot be read: Is a directory"),
        ("a", tmp_path / "none", f"prompt and prompt_file ({tmp_path}/none) are both given; expected one"),
    ):
        with pytest.raises(UserError) as error:
            read_prompt(prompt, file)
        assert str(error.value) == message
    for stdin, message in (
        (io.TextIOWrapper(io.BytesIO(b"")), "prompt on standard input is empty; expected a text to continue"),
        (Terminal(), "prompt: none given; expected --prompt, --prompt_file or a text on standard input"),
        (None, "prompt: none given; expected --prompt, --prompt_file or a text on standard input"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UserError) as error:
            read_prompt(None, None)
        assert str(error.value) == message


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), byte_level()], ids=["bytes", "byte-level"])
def test_names_of_special_tokens(tokenizer: Tokenizer) -> None:
    text = "<|repo_name|>é<|file_sep|><|file_sep|>x<|endoftext|>".encode()
    (plain,) = tokenizer.encode([text])
    assert encode_prompt(tokenizer, text, with_special_tokens=False) == plain.tolist()
    special = tokenizer.special_ids
    e_acute, x = (ids.tolist() for ids in tokenizer.encode(["é".encode(), b"x"]))
    assert encode_prompt(tokenizer, text, with_special_tokens=True) == [
        special["repo_name"],
        *e_acute,
        special["file_sep"],
        special["file_sep"],
        *x,
        special["end"],
    ]


def test_special_tokens_of_the_file_too_the_longest_name_first() -> None:
    (angle,) = byte_level().encode([b">"])
    assert encode_prompt(byte_level(), b"<s>><s></s>>", with_special_tokens=True) == [258, 256, 257, int(angle[0])]


def test_what_a_tokenizer_puts_before_a_text() -> None:
    assert opening_ids(ByteTokenizer()) == []
    assert opening_ids(byte_level()) == []
    assert opening_ids(byte_level(opening=True)) == [256]
