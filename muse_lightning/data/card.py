"""dataset.json: the card and manifest of a prepared dataset. It says what is in it, how it was made, and how to
check it."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from muse_lightning.errors import UserError
from muse_lightning.files import is_file_name, sha256_bytes

FORMAT_VERSION = 2
CARD_NAME = "dataset.json"
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
LONG_DOCUMENT_TOKENS = (16384, 32768, 65536)

DTYPES = ("uint16", "int32")
_TOKENIZER_TYPES = {"name": str, "sha256": str, "vocab_size": int, "special_tokens": dict[str, str]}
# litdata's names for a chunk of bare numbers. Any other format may be one that unpickles what it reads.
_PLAIN_TOKENS = re.compile(r"no_header_(tensor|numpy):\d+")


@dataclass(frozen=True)
class ChunkEntry:
    """One chunk file of a split."""

    filename: str
    sha256: str
    size_bytes: int
    tokens: int
    documents: int


@dataclass(frozen=True)
class SplitEntry:
    """One split: a folder of that name."""

    documents: int
    tokens: int
    text_bytes: int
    """Bytes of text that the tokens stand for; special tokens count 0."""
    long_document_share: dict[str, float]
    """Share of the tokens that lie in documents of at least that many tokens."""
    index_sha256: str
    chunks: list[ChunkEntry]


@dataclass(frozen=True)
class DatasetCard:
    """The content of dataset.json."""

    splits: dict[str, SplitEntry]
    tokenizer: dict[str, Any]
    """`name` as configured, `sha256`, `vocab_size`, `special_tokens` and `special_ids` (name and id of each)."""
    dtype: str
    token_bytes: list[int]
    """Bytes of text of each id."""
    sources: list[dict[str, Any]]
    """What each source gave to the dataset: its `identity`; numbers of `units` read, `documents`, `files` and `bytes`;
    `revisions` (of the repositories written that have one, by name) and `damaged` units (by name, with what is
    wrong)."""
    languages: dict[str, dict[str, int]]
    """`files` and `bytes` in the dataset, by language."""
    licences: dict[str, dict[str, int]]
    """`files` and `bytes` in the dataset, by SPDX expression."""
    skipped_files: dict[str, int]
    """Files left out, by reason. Thresholds are in `inputs`."""
    dropped_documents: dict[str, dict[str, int]]
    """`documents` and `bytes` left out whole, by reason."""
    files: int
    """Files written."""
    inputs: dict[str, Any]
    """Everything that decided the content. Equal inputs: the dataset is used again."""
    fingerprint: str
    """SHA-256 over the content: chunks, tokenizer and format. Equal fingerprints: equal data, wherever they lie."""
    format_version: int = FORMAT_VERSION
    created_by: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of dataset.json: a line each, but the bytes of all ids last and in one."""
        content = asdict(self)
        token_bytes = json.dumps(content.pop("token_bytes"))
        return json.dumps(content, indent=1).removesuffix("\n}") + f',\n "token_bytes": {token_bytes}\n}}\n'

    def split(self, name: str) -> SplitEntry:
        """A split by name.

        Raises:
            UserError: the dataset has no such split.
        """
        if name not in self.splits:
            raise UserError(f"split {name!r}: not in this dataset; it has {', '.join(self.splits)}")
        return self.splits[name]


def content_fingerprint(splits: dict[str, SplitEntry], tokenizer_sha256: str) -> str:
    """Hexadecimal SHA-256 over what a model would see."""
    chunks = {name: [chunk.sha256 for chunk in split.chunks] for name, split in splits.items()}
    return sha256_bytes(json.dumps([FORMAT_VERSION, tokenizer_sha256, chunks], sort_keys=True).encode())


def read_card(dataset: Path) -> DatasetCard:
    """Read and check dataset.json.

    Raises:
        UserError: the folder is not a prepared dataset, or one of another format version.
    """
    path = dataset / CARD_NAME
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{dataset} is not a prepared dataset: {path.name}: {error.strerror}; `muse prepare` makes one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not JSON ({error}); prepare the dataset again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version} found, {FORMAT_VERSION} expected; "
            "prepare the dataset again with this version of muse-lightning"
        )
    try:
        content["splits"] = {
            name: SplitEntry(**{**split, "chunks": [ChunkEntry(**chunk) for chunk in split["chunks"]]})
            for name, split in content["splits"].items()
        }
        card = DatasetCard(**content)
        _check_card(card)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; prepare the dataset again") from error
    return card


def _check_card(card: DatasetCard) -> None:
    """Check that what a card says has the types that it should, and names no file outside its folders.

    Raises:
        ValueError: something has not; the message says where.
    """
    for name, hint in get_type_hints(DatasetCard).items():
        _check_type(getattr(card, name), hint, name)
    for name, split in card.splits.items():
        for path in (name, *(chunk.filename for chunk in split.chunks)):
            if not is_file_name(path):
                raise ValueError(f"splits: {path!r:.80} is no name of a file in its own folder")
    if card.dtype not in DTYPES:
        raise ValueError(f"dtype: {card.dtype!r:.80} found; accepted: {', '.join(DTYPES)}")
    for key, hint in _TOKENIZER_TYPES.items():
        _check_type(card.tokenizer[key], hint, f"tokenizer.{key}")


def _check_type(value: Any, hint: Any, where: str) -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        for name, field_hint in get_type_hints(hint).items():
            _check_type(getattr(value, name), field_hint, f"{where}.{name}")
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            _check_type(item, arguments[1], f"{where}.{key:.40}")
    elif origin is list and isinstance(value, list):
        for number, item in enumerate(value):
            _check_type(item, arguments[0], f"{where}[{number}]")
    elif hint is int:
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{where}: {value!r:.80} found, a whole number of at least 0 expected")
    elif hint is float:
        if type(value) not in (int, float) or not abs(value) < math.inf:
            raise ValueError(f"{where}: {value!r:.80} found, a number expected")
    elif hint is not Any and not isinstance(value, origin or hint):
        raise ValueError(f"{where}: {value!r:.80} found, {(origin or hint).__name__} expected")


def check_index(folder: Path, entry: SplitEntry, dtype: str) -> None:
    """Check a split's index.json before litdata reads it.

    Raises:
        UserError: the index is missing, is not the one written beside the card, or selects a data format other than
            plain tokens.
    """
    path = folder / INDEX_NAME
    try:
        content = path.read_bytes()
        data_format = json.loads(content)["config"]["data_format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); prepare the dataset again") from error
    if not isinstance(data_format, list) or len(data_format) != 1 or not _PLAIN_TOKENS.fullmatch(str(data_format[0])):
        raise UserError(f"{path}: data format {data_format!r:.200} refused; only plain tokens of type {dtype} are read")
    if sha256_bytes(content) != entry.index_sha256:
        raise UserError(
            f"{path} is not the file that {CARD_NAME} describes (SHA-256 differs); prepare the dataset again"
        )


def count_blocks(entry: SplitEntry, seq_len: int) -> int:
    """Number of blocks of `seq_len + 1` tokens in a split. A chunk's last tokens that fill no block are left out."""
    return sum(chunk.tokens // (seq_len + 1) for chunk in entry.chunks)


def largest_seq_len(entry: SplitEntry, blocks: int) -> int:
    """The largest context of which a split has at least `blocks` blocks; 0 if there is none."""
    low, high = 0, max((chunk.tokens for chunk in entry.chunks), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if count_blocks(entry, middle) >= blocks:
            low = middle
        else:
            high = middle - 1
    return low


def long_document_share(lengths: np.ndarray) -> dict[str, float]:
    """Share of the tokens in documents of at least 16k, 32k and 64k tokens, from the documents' lengths."""
    total = max(int(lengths.sum()), 1)
    return {str(limit): round(float(lengths[lengths >= limit].sum()) / total, 4) for limit in LONG_DOCUMENT_TOKENS}
