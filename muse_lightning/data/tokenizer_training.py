"""Training of a byte-level BPE tokenizer on a source: `muse tokenizer train`."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from muse_lightning.data.documents import DocumentSource
from muse_lightning.data.filters import DEFAULT_FILTERS, Filters
from muse_lightning.data.selection import Limits, choose_documents
from muse_lightning.data.tokenizer import DEFAULT_SPECIAL_TOKENS, SpecialTokens
from muse_lightning.errors import UserError
from muse_lightning.files import atomic_write


def train_tokenizer(
    sources: list[DocumentSource],
    output: Path,
    vocab_size: int = 32768,
    max_bytes: int | None = 200_000_000,
    max_documents: int | None = None,
    seed: int = 0,
    filters: Filters = DEFAULT_FILTERS,
    special_tokens: SpecialTokens = DEFAULT_SPECIAL_TOKENS,
) -> None:
    """Train a byte-level BPE tokenizer on source files and write it as a tokenizer.json.

    Args:
        sources: Where the text comes from, as in a recipe's data.sources.
        output: The file to write, or the folder to write tokenizer.json in. Replaced when it exists.
        vocab_size: Number of ids: 256 bytes, the special tokens, the rest merges.
        max_bytes: Most bytes of text to learn from. Whole documents are taken in seeded order.
        max_documents: Most documents to learn from; null for no limit.
        seed: Which documents are taken when a limit applies.
        filters: Which files are left out.
        special_tokens: Names of the special tokens.
    """
    names = list(asdict(special_tokens).values())
    if vocab_size < 256 + len(names):
        raise UserError(
            f"vocab_size: {vocab_size} found, at least {256 + len(names)} expected (bytes and special tokens)"
        )
    if output.is_dir() or output.suffix != ".json":
        output = output / "tokenizer.json"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot create {output.parent}: {error.strerror}") from error
    listed = [document for source in sources for document in source.documents()]
    documents = choose_documents(listed, Limits(max_documents, max_bytes), filters, seed)

    files = used = 0

    def texts() -> Iterator[str]:
        nonlocal files, used
        for document in documents:
            for file in document.files:
                try:
                    content = file.read()
                except OSError:
                    continue
                if filters.rejects_content(content) is None:
                    files += 1
                    used += len(content)
                    yield content.decode()

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if not files:
        raise UserError(
            f"sources: no file of {len(listed)} listed repositories passes the filters; nothing to train on"
        )
    atomic_write(output, tokenizer.to_str(pretty=True))
    print(f"{output}: {tokenizer.get_vocab_size():,} tokens, from {files:,} files, {used / 1e6:,.1f} MB")
