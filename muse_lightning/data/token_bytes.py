"""How many bytes of text each token stands for, read from a tokenizer.json: what bits per byte are divided by."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from muse_lightning.errors import UserError

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_byte_lengths(described: Mapping[str, Any], vocab: Mapping[str, int]) -> np.ndarray:
    """Bytes of text per id.

    Args:
        described: A parsed tokenizer.json.
        vocab: Every token with its id, added ones included.
    Returns:
        int64 [largest id + 1]; 0 for special tokens, for the unknown token, and for ids without a token.
    Raises:
        UserError: the decoder is neither byte-level nor SentencePiece-like, so that a token has no fixed byte length.

    Byte-level: every character stands for one byte. SentencePiece-like: the mark of a space counts one, `<0x0A>` one,
    anything else its UTF-8 length; the space that such tokenizers put before a text counts although the text has none.
    """
    kinds = _decoder_kinds(described)
    lengths = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    if "ByteLevel" in kinds:
        alphabet = frozenset(ByteLevel.alphabet())
        for token, index in vocab.items():
            lengths[index] = sum(1 if char in alphabet else len(char.encode()) for char in token)
    elif "Metaspace" in kinds or "Replace" in kinds:
        for token, index in vocab.items():
            is_byte = "ByteFallback" in kinds and _BYTE.fullmatch(token)
            lengths[index] = 1 if is_byte else len(token.replace(_SPACE, " ").encode())
    else:
        raise UserError(
            f"its decoder ({', '.join(sorted(kinds)) or 'none'}) gives no byte length per token; "
            "byte-level BPE and SentencePiece-like tokenizers are accepted"
        )
    for added in described.get("added_tokens") or []:
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    unknown = described["model"].get("unk_token")
    if unknown in vocab:
        lengths[vocab[unknown]] = 0
    if described["model"].get("unk_id") is not None:  # a Unigram model names it by id
        lengths[described["model"]["unk_id"]] = 0
    return lengths


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
