"""Training of a byte-level BPE tokenizer on a source: `muse tokenizer train`."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from muse_lightning.data.documents import DamagedSource, DocumentSource, ReadLimits, Repository, SourceUnit
from muse_lightning.data.filters import DEFAULT_FILTERS, Filters
from muse_lightning.data.licences import LicenceFinder
from muse_lightning.data.selection import order_key
from muse_lightning.data.tokenizer import DEFAULT_SPECIAL_TOKENS, SpecialTokens
from muse_lightning.errors import UserError, reason_of
from muse_lightning.files import atomic_write, new_folders_removed_on_error

# Of max_bytes: reading stops when so much is there, since the last bytes may be found only after many large files.
_ENOUGH = 0.99
_MOST_IN_MEMORY = 64 << 20


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
        output: The file to write, or the folder to write tokenizer.json in. One that is there already is
            refused: datasets and models belong to it.
        vocab_size: Number of ids: 256 bytes, the special tokens, the rest merges.
        max_bytes: Most bytes of text to learn from, taken in seeded order.
        max_documents: Most documents to learn from; null for no limit.
        seed: Which documents are taken when a limit applies.
        filters: Which files are left out, as in a recipe's data.filters.
        special_tokens: Names of the special tokens.
    """
    names = list(asdict(special_tokens).values())
    if vocab_size < 256 + len(names):
        raise UserError(
            f"vocab_size: {vocab_size} found, at least {256 + len(names)} expected (bytes and special tokens)"
        )
    if output.is_dir() or output.suffix != ".json":
        output = output / "tokenizer.json"
    if output.exists():
        raise UserError(f"output: {output} exists already, and datasets and models may belong to it; give a new one")
    units = [unit for source in sources for unit in source.units()]
    # Stable: equal names of two sources stay in the order of the sources.
    units.sort(key=lambda unit: order_key(seed, unit.name, ""))
    files = used = documents = 0

    def texts() -> Iterator[str]:
        nonlocal files, used, documents
        for repository in _repositories(units, ReadLimits(max_file_bytes=filters.max_file_bytes)):
            kept = 0
            for content in _kept(repository, filters):
                if max_bytes is not None and used + len(content) > max_bytes:
                    continue
                kept += 1
                used += len(content)
                yield content.decode()
            files += kept
            documents += kept > 0
            is_full = max_bytes is not None and used >= _ENOUGH * max_bytes
            if is_full or (max_documents is not None and documents >= max_documents):
                return

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with new_folders_removed_on_error(output.parent):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output: cannot create {output.parent}: {error.strerror}") from error
        tokenizer.train_from_iterator(texts(), trainer)
        if not files:
            raise UserError(f"sources: no file of {len(units)} listed units passes the filters; nothing to train on")
        atomic_write(output, tokenizer.to_str(pretty=True))
    found = tokenizer.get_vocab_size()
    print(f"{output}: {found:,} tokens, from {files:,} files, {used / 1e6:,.1f} MB")
    if found < vocab_size:
        print(
            f"vocab_size: {vocab_size:,} asked for, but the text has pairs for {found:,} only; give more text "
            "(sources, max_bytes, max_documents), or expect a model with unused ids",
            file=sys.stderr,
            flush=True,
        )


def _kept(repository: Repository, filters: Filters) -> Iterator[bytes]:
    """Contents of the files that the filters, that of licences too, keep: what a dataset would be made of."""
    finder = LicenceFinder(repository.licence)
    files: list[tuple[str, int]] = []
    # A licence file may come after the files it is about, which may be many.
    with _temporary_file() as waiting:
        for file in repository.files:
            finder.add(file.path, file.content)
            if file.for_licence or filters.check(file.path, file.content).reason is not None:
                continue
            if filters.licences is None:
                yield file.content
            else:
                with _full_folder_named():
                    waiting.write(file.content)
                files.append((file.path, len(file.content)))
        with _full_folder_named():
            waiting.seek(0)
        for path, size in files:
            with _full_folder_named():
                content = waiting.read(size)
            if filters.check_licence(finder.licence_of(path)) is None:
                yield content


@contextmanager
def _temporary_file() -> Iterator[IO[bytes]]:
    file = tempfile.SpooledTemporaryFile(max_size=_MOST_IN_MEMORY)  # noqa: SIM115
    try:
        yield file
    finally:
        # What a full disk has refused is still to be written, and is refused again.
        with suppress(OSError):
            file.close()


@contextmanager
def _full_folder_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"TMPDIR: no room in {tempfile.gettempdir()} for files that wait for their licence ({reason_of(error)}); "
            "make room, or set TMPDIR to another folder"
        ) from error


def _repositories(units: Sequence[SourceUnit], limits: ReadLimits) -> Iterator[Repository]:
    for unit in units:
        try:
            yield from unit.read(limits)
        except DamagedSource as error:
            print(f"left out, damaged: {unit.name}: {error}", file=sys.stderr, flush=True)
