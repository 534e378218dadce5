"""Text to ids and back: plain bytes, or any Hugging Face tokenizer.json, each with the special tokens of documents."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tokenizers

from muse_lightning.data.token_bytes import token_texts
from muse_lightning.errors import UserError, reason_of
from muse_lightning.files import expand_home, sha256_bytes

MAX_IDS = 1 << 24


@dataclass(frozen=True)
class SpecialTokens:
    """Names of the special tokens. The defaults are Qwen2.5-Coder's (Hui et al. 2024, arXiv 2409.12186, section
    3.1)."""

    repo_name: str = "<|repo_name|>"
    """Opens a document; the repository's name follows."""
    file_sep: str = "<|file_sep|>"
    """Opens a file; its path, a newline and its content follow."""
    end: str = "<|endoftext|>"
    """Ends a document."""

    def __post_init__(self) -> None:
        names = list(asdict(self).values())
        if len(set(names)) < len(names) or not all(names):
            raise UserError(f"data.special_tokens: three different names expected, found {', '.join(map(repr, names))}")


DEFAULT_SPECIAL_TOKENS = SpecialTokens()


class Tokenizer(ABC):
    """Ids of text. A special token's name that occurs in a text is text: only `special_ids` are special.

    Attributes:
        special_tokens: Names of the special tokens.
        special_ids: Id of each field of SpecialTokens.
        token_texts: Text of each id, as bytes; empty for special tokens.
        token_bytes: int64 [vocab_size]. Their lengths.
        sha256: Identity of the tokenizer with its special tokens; equal ones give equal ids.
    """

    special_tokens: SpecialTokens
    special_ids: dict[str, int]
    token_texts: Sequence[bytes]
    token_bytes: np.ndarray
    sha256: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.token_bytes)

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """The smallest type that holds every id and that litdata stores."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    @abstractmethod
    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text (UTF-8; what is not is replaced where the tokenizer cannot hold it), of type `dtype`."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of some ids, special tokens by name. A character cut in two is shown as U+FFFD."""

    @abstractmethod
    def to_json(self) -> str | None:
        """The content of a tokenizer.json; None for the built-in tokenizer, which needs no file."""


class ByteTokenizer(Tokenizer):
    """256 ids, one per byte, then the special tokens in the order of SpecialTokens. No training, no file, no unknown
    text."""

    def __init__(self, special_tokens: SpecialTokens = DEFAULT_SPECIAL_TOKENS) -> None:
        names = asdict(special_tokens)
        self.special_tokens = special_tokens
        self.special_ids = {field: 256 + index for index, field in enumerate(names)}
        self.token_texts = [bytes([byte]) for byte in range(256)] + [b""] * len(names)
        self.token_bytes = _lengths(self.token_texts)
        self.sha256 = sha256_bytes(json.dumps(["bytes", names]).encode())
        self._names = list(names.values())

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = b"".join(bytes([i]) if i < 256 else self._names[i - 256].encode() for i in map(int, ids))
        return text.decode("utf-8", errors="replace")

    def to_json(self) -> None:
        return None


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer.json of the tokenizers library whose tokens have a byte length (byte-level BPE,
    SentencePiece-like)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special_tokens: SpecialTokens = DEFAULT_SPECIAL_TOKENS) -> None:
        names = asdict(special_tokens)
        check_ids(tokenizer)
        # A file may ask for truncation or padding, which would cut or fill documents silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in names.values()]
        )
        # Source text that contains the name of a special token stays text. (Qwen's own file marks <|file_sep|> as not
        # special; adding it again made it so.)
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.special_tokens = special_tokens
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.special_ids = {field: vocab[name] for field, name in names.items()}
        described = json.loads(tokenizer.to_str())
        self.token_texts = token_texts(described, vocab)
        self.token_bytes = _lengths(self.token_texts)
        self.sha256 = sha256_bytes(json.dumps([described, names], sort_keys=True).encode())

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        with in_one_line("data.tokenizer: it cannot encode a text"):
            encodings = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        with in_one_line("data.tokenizer: it cannot decode its ids"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickling forgets encode_special_tokens.
        return _from_json, (self.to_json(), self.special_tokens)


def check_ids(tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse ids that no vocabulary needs: a file can give a token any of 32 bits, and the library itself goes through
    all below it.

    Raises:
        UserError: there is one.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= MAX_IDS:
        raise UserError(f"it has the id {largest:,}; accepted: ids below {MAX_IDS:,}")


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises becomes a UserError: `what`, and its reason.

    It raises bare Exceptions, also of files that it has read before, and where its Rust code panics something that is
    no Exception.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({reason_of(error)})") from error


def _lengths(texts: Sequence[bytes]) -> np.ndarray:
    return np.array([len(text) for text in texts], dtype=np.int64)


def _from_json(text: str, special_tokens: SpecialTokens) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizers.Tokenizer.from_str(text), special_tokens)


def load_tokenizer(name: str, special_tokens: SpecialTokens = DEFAULT_SPECIAL_TOKENS) -> Tokenizer:
    """The tokenizer that a recipe names.

    Args:
        name: `bytes`, or the path of a tokenizer.json or of a folder that holds one.
        special_tokens: Looked up in the tokenizer by name; what it lacks is added behind its vocabulary.
    Raises:
        UserError: there is no such file, it is not a tokenizer, or its tokens have no byte length.
    """
    if name == "bytes":
        return ByteTokenizer(special_tokens)
    path = expand_home(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"data.tokenizer: no file {path}; give 'bytes' or the path of a tokenizer.json")
    with in_one_line(f"data.tokenizer: {path} is not a tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        try:
            return HuggingFaceTokenizer(tokenizer, special_tokens)
        except UserError as error:
            raise UserError(f"data.tokenizer: {path}: {error}") from error
