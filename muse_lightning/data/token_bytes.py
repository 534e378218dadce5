"""The bytes of text that each token stands for, read from a tokenizer.json: what bits per byte are divided by."""

import re
from collections.abc import Mapping
from typing import Any

from muse_lightning.errors import UserError

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_texts(described: Mapping[str, Any], vocab: Mapping[str, int]) -> list[bytes]:
    """Text of each id.

    Args:
        described: A parsed tokenizer.json.
        vocab: Every token with its id, added ones included.
    Returns:
        One per id up to the largest; empty for special tokens, for the unknown token, and for ids without a token.
    Raises:
        UserError: the decoder is neither byte-level nor SentencePiece-like, so that a token has no fixed bytes.

    Byte-level: every character stands for one byte. SentencePiece-like: the mark of a space is a space, `<0x0A>` a
    byte, anything else itself; the space that such tokenizers put before a text counts although the text has none.
    """
    kinds = _decoder_kinds(described)
    texts = [b""] * (max(vocab.values()) + 1)
    if "ByteLevel" in kinds:
        alphabet = byte_level_alphabet()
        for token, index in vocab.items():
            texts[index] = b"".join(alphabet.get(char) or char.encode() for char in token)
    elif "Metaspace" in kinds or "Replace" in kinds:
        for token, index in vocab.items():
            is_byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
            texts[index] = bytes.fromhex(is_byte[1]) if is_byte else token.replace(_SPACE, " ").encode()
    else:
        raise UserError(
            f"its decoder ({', '.join(sorted(kinds)) or 'none'}) gives no byte length per token; "
            "byte-level BPE and SentencePiece-like tokenizers are accepted"
        )
    for added in described.get("added_tokens") or []:
        texts[added["id"]] = b"" if added["special"] else added["content"].encode()
    unknown = described["model"].get("unk_token")
    if unknown in vocab:
        texts[vocab[unknown]] = b""
    if described["model"].get("unk_id") is not None:  # a Unigram model names it by id
        texts[described["model"]["unk_id"]] = b""
    return texts


def byte_level_alphabet() -> dict[str, bytes]:
    """The character that byte-level BPE writes for each byte: itself where Latin-1 prints it, else one from U+0100 on.

    Source: GPT-2 (Radford et al. 2019). The tokenizers library lists these characters, but not which byte is which.
    """
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    pairs = [*((chr(byte), byte) for byte in printed), *((chr(256 + i), byte) for i, byte in enumerate(others))]
    return {char: bytes([byte]) for char, byte in pairs}


def _decoder_kinds(described: Mapping[str, Any]) -> set[str]:
    """Types of the decoder's steps. Only a Replace that turns the SentencePiece mark into a space counts as one."""
    decoder = described.get("decoder") or {}
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = set()
    for step in steps:
        if step["type"] == "Replace" and (step["pattern"] != {"String": _SPACE} or step["content"] != " "):
            continue
        kinds.add(step["type"])
    return kinds
