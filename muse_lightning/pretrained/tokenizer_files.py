"""Tokenizers of Hugging Face folders: reading them, and writing ours as transformers reads them."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers

from muse_lightning.data.token_bytes import byte_level_alphabet
from muse_lightning.data.tokenizer import (
    DEFAULT_SPECIAL_TOKENS,
    SpecialTokens,
    Tokenizer,
    check_ids,
    in_one_line,
    load_tokenizer,
)
from muse_lightning.errors import UserError
from muse_lightning.files import read_json
from muse_lightning.model.config import LlamaConfig

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Which tokens documents were made with: for us, transformers does not know it.
_DOCUMENT_TOKENS = "document_special_tokens"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a Hugging Face folder may have of a tokenizer; none of it is code."""


def folder_tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None where it has no tokenizer.json.

    Raises:
        UserError: it cannot be read, or has ids that the model lacks.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    check_vocabulary(path, config)
    return load_tokenizer(str(path), choose_special_tokens(folder, config))


def check_vocabulary(path: Path, config: LlamaConfig) -> None:
    """Refuse a tokenizer.json with ids that a model lacks.

    Raises:
        UserError: it has, or it is no tokenizer.
    """
    size = _size(read_tokenizer(path))
    if size > config.vocab_size:
        raise UserError(f"{path} has ids up to {size - 1}, the model's vocab_size is {config.vocab_size}")


def _size(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the largest id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json as the library has it.

    Raises:
        UserError: it is none.
    """
    with in_one_line(f"{path} is not a tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    try:
        check_ids(tokenizer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return tokenizer


def choose_special_tokens(folder: Path, config: LlamaConfig) -> SpecialTokens:
    """Names of a tokenizer's own tokens that can stand for the special tokens of documents.

    In a folder that was exported, those of training. Else by name where it has them (Qwen2.5-Coder's), and as `end` the
    token that ends its texts. What is missing is added behind the vocabulary where the model has rows to spare; else
    tokens are used that stand for no text: reserved ones and others.
    """
    tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    added = json.loads(tokenizer.to_str())["added_tokens"]
    special = [token["content"] for token in added if token["special"]]
    settings = _read_settings(folder)
    defaults = asdict(DEFAULT_SPECIAL_TOKENS)
    recorded: Any = settings.get(_DOCUMENT_TOKENS)
    if (
        isinstance(recorded, dict)
        and recorded.keys() == defaults.keys()
        and all(n in special for n in recorded.values())
    ):
        return SpecialTokens(**recorded)
    known = {token["content"] for token in added}
    chosen = {field: name for field, name in defaults.items() if name in known}
    end = _content(settings.get("eos_token"))
    if end in known and end not in chosen.values():
        chosen["end"] = end
    has_room = _size(tokenizer) + len(defaults) <= config.vocab_size
    spare = iter(()) if has_room else _spare_names(special, settings, set(chosen.values()))
    for field, name in defaults.items():
        if field not in chosen:
            chosen[field] = next(spare, name)
    return SpecialTokens(**chosen)


def _spare_names(special: Sequence[str], settings: Mapping[str, Any], taken: Collection[str]) -> Iterator[str]:
    """Special tokens that documents do not use yet, the least surprising first."""
    reserved = [name for name in special if "reserved" in name or "unused" in name]
    others = [_content(settings.get(key)) for key in ("bos_token", "unk_token", "pad_token")]
    return (name for name in dict.fromkeys([*reserved, *others]) if name in special and name not in taken)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Content of tokenizer_config.json; nothing where there is none.

    Raises:
        UserError: it is not JSON of keys with values.
    """
    path = folder / TOKENIZER_CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings; expected keys with values")
    return found


def _content(token: Any) -> str:
    """Text of a token in tokenizer_config.json, where it may be described at length."""
    return str(token.get("content") if isinstance(token, dict) else token)


def folder_token_ids(folder: Path) -> dict[str, Any]:
    """Ids of a Hugging Face folder's special tokens as its config.json has them: bos_token_id and others, or lists."""
    found = read_json(folder / "config.json")
    return {name: found.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def tokenizer_files(tokenizer: Tokenizer, config: LlamaConfig) -> tuple[dict[str, bytes | str], dict[str, Any]]:
    """A tokenizer as transformers' AutoTokenizer reads it.

    Returns:
        Content of each file by name; ids of the special tokens by transformers' names for them.
    """
    names = asdict(tokenizer.special_tokens)
    described = json.loads(tokenizer.to_json() or byte_level_json(tokenizer))
    # What it would add around a text the model was not trained with.
    described["post_processor"] = None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "eos_token": names["end"],
        "pad_token": names["end"],
        "additional_special_tokens": [names["repo_name"], names["file_sep"]],
        "clean_up_tokenization_spaces": False,
        _DOCUMENT_TOKENS: names,
    }
    end = tokenizer.special_ids["end"]
    files: dict[str, bytes | str] = {
        TOKENIZER_FILE: json.dumps(described, ensure_ascii=False, indent=2),
        TOKENIZER_CONFIG_FILE: json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
    }
    return files, {"eos_token_id": end, "pad_token_id": end}


def byte_level_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json of the built-in tokenizer: byte-level BPE without a merge, in which byte b has the id b."""
    vocab = {char: byte[0] for char, byte in byte_level_alphabet().items()}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    names = asdict(tokenizer.special_tokens)
    ordered = sorted(tokenizer.special_ids, key=tokenizer.special_ids.__getitem__)
    built.add_special_tokens([tokenizers.AddedToken(names[field], special=True, normalized=False) for field in ordered])
    return built.to_str()
