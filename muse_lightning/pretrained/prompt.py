"""From a prompt to ids: where it comes from, what a model's tokenizer puts before it, and names of special tokens."""

import json
import re
import sys
from pathlib import Path

import tokenizers

from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.errors import UserError, reason_of
from muse_lightning.files import expand_home


def read_prompt(prompt: str | None, prompt_file: Path | None) -> bytes:
    """The prompt: as given, of a file, or, with neither, standard input.

    Raises:
        UserError: both are given, or neither and standard input is a terminal; the file cannot be read; it is empty.
    """
    if prompt is not None and prompt_file is not None:
        raise UserError(f"prompt and prompt_file ({prompt_file}) are both given; expected one")
    if prompt is not None:
        name, text = "prompt", prompt.encode(errors="surrogateescape")
    elif prompt_file is not None:
        name = f"prompt_file {prompt_file}"
        try:
            text = expand_home(prompt_file).read_bytes()
        except OSError as error:
            raise UserError(f"prompt_file: {prompt_file} cannot be read: {reason_of(error)}") from None
    elif sys.stdin is None or sys.stdin.isatty():
        raise UserError("prompt: none given; expected --prompt, --prompt_file or a text on standard input")
    else:
        name, text = "prompt on standard input", sys.stdin.buffer.read()
    if not text:
        raise UserError(f"{name} is empty; expected a text to continue")
    return text


def special_names(tokenizer: Tokenizer) -> dict[str, int]:
    """Every special token of a tokenizer with its id."""
    names = {getattr(tokenizer.special_tokens, field): index for field, index in tokenizer.special_ids.items()}
    described = tokenizer.to_json()
    added = [] if described is None else json.loads(described)["added_tokens"]
    return names | {token["content"]: token["id"] for token in added if token["special"]}


def encode_prompt(tokenizer: Tokenizer, text: bytes, *, with_special_tokens: bool) -> list[int]:
    """Ids of a prompt.

    Args:
        tokenizer: the model's.
        text: UTF-8.
        with_special_tokens: names of special tokens in the text are these tokens; else they are text.
    """
    names = special_names(tokenizer) if with_special_tokens else {}
    longest_first = sorted((name.encode() for name in names), key=len, reverse=True)
    pattern = b"(" + b"|".join(map(re.escape, longest_first)) + b")"
    pieces = re.split(pattern, text) if names else [text]
    ids: list[int] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            ids.append(names[piece.decode()])
        elif piece:
            ids += tokenizer.encode([piece])[0].tolist()
    return ids


def opening_ids(tokenizer: Tokenizer) -> list[int]:
    """What a tokenizer.json puts before every text by itself, such as Llama's <|begin_of_text|>."""
    described = tokenizer.to_json()
    if described is None:
        return []
    library = tokenizers.Tokenizer.from_str(described)
    plain = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a").ids
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return whole[: next(starts, 0)]
