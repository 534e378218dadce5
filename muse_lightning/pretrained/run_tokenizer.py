"""The tokenizer of a run: the one that its data was prepared with, where a dataset is at hand to say which that is."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from muse_lightning.data.card import DatasetCard, read_card
from muse_lightning.data.filesystems import is_url
from muse_lightning.data.ledger import FOLDER_NAME, LedgerHeader, ledger_path, read_ledger
from muse_lightning.data.tokenizer import SpecialTokens, Tokenizer, load_tokenizer
from muse_lightning.errors import UserError, shown_url
from muse_lightning.files import expand_home
from muse_lightning.model.config import LlamaConfig
from muse_lightning.pretrained.run_folder import CONFIG_FILE, run_configuration
from muse_lightning.pretrained.tokenizer_files import TOKENIZER_FILE


def run_tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer:
    """The tokenizer that a run was trained with.

    A file may have changed since, and a relative name may mean another one here. So the copy in the run's dataset comes
    first, and what is taken must be what the dataset's card names. Without a dataset a line says that it was not
    checked.

    Raises:
        UserError: it is in neither place, is another than the card names, or has ids that the model lacks.
    """
    data: dict[str, Any] = run_configuration(folder).get("data") or {}
    name = str(data.get("tokenizer") or "bytes")
    try:
        special = SpecialTokens(**(data.get("special_tokens") or {}))
    except TypeError as error:
        raise UserError(f"{folder / CONFIG_FILE}: data.special_tokens are not understood: {error}") from None
    # No file can have changed where there is none.
    tokenizer = load_tokenizer(name, special) if name == "bytes" else _file_tokenizer(folder, data, name, special)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, config.vocab_size is {config.vocab_size}"
        )
    return tokenizer


def _file_tokenizer(folder: Path, data: Mapping[str, Any], name: str, special: SpecialTokens) -> Tokenizer:
    datasets = list(_local_datasets(data))
    copies = [str(dataset / TOKENIZER_FILE) for dataset in datasets if (dataset / TOKENIZER_FILE).is_file()]
    named = [] if is_url(name) or not expand_home(name).exists() else [name]
    what = f"{folder / CONFIG_FILE}: data.tokenizer {shown_url(name)}"
    if not copies and not named:
        raise UserError(f"{what} is not on this machine; expected a path of it")
    described = next(_trained_datasets(folder, datasets), None)
    if described is None:
        print(f"{what}: not checked, the dataset that the run began with is not on this machine", file=sys.stderr)
        return load_tokenizer([*named, *copies][0], special)
    dataset, card = described
    wanted = card.tokenizer["sha256"]
    found = [load_tokenizer(path, special) for path in (*copies, *named)]
    for tokenizer in found:
        if tokenizer.sha256 == wanted:
            return tokenizer
    raise UserError(
        f"{what} is {found[-1].sha256[:12]} here, but {dataset} was prepared with {wanted[:12]}; expected that one, "
        f"there or at {dataset / TOKENIZER_FILE}"
    )


def _local_datasets(data: Mapping[str, Any]) -> Iterator[Path]:
    """Folders of a run's data."""
    mixture = data.get("mixture") or []
    names = [data.get("dataset"), *(entry.get("dataset") for entry in mixture if isinstance(entry, Mapping))]
    return (expand_home(str(name)) for name in names if name is not None and not is_url(str(name)))


def _trained_datasets(folder: Path, datasets: list[Path]) -> Iterator[tuple[Path, DatasetCard]]:
    """Datasets with a card; where the run has a ledger, those alone that it began with: one may have been prepared anew
    since."""
    known = _fingerprints(folder)
    for dataset in datasets:
        try:
            card = read_card(dataset)
        except UserError:
            continue
        if known is None or card.fingerprint in known:
            yield dataset, card


def _fingerprints(folder: Path) -> set[str] | None:
    """Of the datasets that a run began with; None where no ledger says."""
    with suppress(UserError):
        header = next(read_ledger(ledger_path(folder / FOLDER_NAME, 0)), None)
        if isinstance(header, LedgerHeader):
            return {dataset.fingerprint for dataset in header.datasets}
    return None
