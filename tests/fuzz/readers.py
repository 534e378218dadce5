"""What is read of files that somebody else may have written, each as a function of the file's bytes.

A value, or an error in one line: anything else is a finding. `tests/fuzz/atheris_readers.py` looks for inputs that
break this; `tests/fuzz/test_corpus.py` replays those that did.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from muse_lightning.checkpoints.choice import by_metric, last_checkpoint
from muse_lightning.data.card import SplitEntry, check_index, count_blocks, largest_seq_len, read_card
from muse_lightning.data.inspection import describe_card
from muse_lightning.data.prepare import damaged_chunks
from muse_lightning.data.tokenizer import load_tokenizer
from muse_lightning.errors import UserError, one_line
from muse_lightning.model.config import LlamaConfig
from muse_lightning.pretrained.generate import end_ids
from muse_lightning.pretrained.reference import read_hf_config
from muse_lightning.pretrained.run_folder import run_architecture, run_configuration
from muse_lightning.pretrained.tensors import load_pickle, open_safetensors, read_index
from muse_lightning.pretrained.tokenizer_files import check_vocabulary, choose_special_tokens, folder_tokenizer

CORPUS = Path(__file__).parent / "corpus"
LONGEST_LINE = 2000
Reader = Callable[[Path], None]

_SIZES = LlamaConfig(320, 16, 32, 2, 4, 2, 64)


def checkpoint_manifest(folder: Path) -> None:
    """step=N.manifest.json, as `last` and `best` are found by it."""
    (folder / "step=1.ckpt").write_bytes(b"weights")
    said: list[str] = []
    last_checkpoint(folder, said.append)
    for line in said:
        check_line(line)
    by_metric(folder)


def dataset_card(folder: Path) -> None:
    """dataset.json, and all that `muse data inspect` and a loader take from it."""
    card = read_card(folder)
    assert np.dtype(card.dtype).itemsize in (2, 4)
    for name in card.splits:
        split = card.split(name)
        assert count_blocks(split, 8) >= 0
        largest_seq_len(split, 4)
    for line in damaged_chunks(folder, card):
        check_line(line)
        assert ".." not in Path(line.split()[0]).relative_to(folder).parts
    torch.tensor(card.token_bytes)
    describe_card(folder, card)


def litdata_index(folder: Path) -> None:
    """index.json of a split: accepted by its digest alone, so that whatever else comes must be refused."""
    entry = SplitEntry(1, 1, 1, {}, "0" * 64, [])
    check_index(folder, entry, "uint16")
    raise AssertionError("accepted")


def tokenizer(folder: Path) -> None:
    """tokenizer.json of a recipe and of a Hugging Face folder; what is accepted encodes and decodes."""
    loaded = load_tokenizer(str(folder / "tokenizer.json"))
    (ids,) = loaded.encode([b"def main():\n\treturn 1\xff"])
    loaded.decode(ids)
    assert len(loaded.token_bytes) >= loaded.vocab_size
    check_vocabulary(folder / "tokenizer.json", _SIZES)
    choose_special_tokens(folder, _SIZES)


def tokenizer_config(folder: Path) -> None:
    """tokenizer_config.json beside a tokenizer that is whole."""
    (folder / "tokenizer.json").write_bytes((CORPUS / "tokenizer" / "seed-byte-level.json").read_bytes())
    folder_tokenizer(folder, _SIZES)


def safetensors_file(folder: Path) -> None:
    """A .safetensors file: header, and every tensor."""
    store = open_safetensors(folder / "model.safetensors")
    for name in store:
        assert store[name].shape == store.shape(name)


def weights_index(folder: Path) -> None:
    """model.safetensors.index.json: names of files in its own folder."""
    for name in read_index(folder / "model.safetensors.index.json").values():
        assert (folder / name).parent == folder
        (folder / name).is_file()


def torch_pickle(folder: Path) -> None:
    """A file of torch.save, of which tensors and plain values are unpickled."""
    load_pickle(folder / "pytorch_model.bin", "a file of torch.save with tensors alone")


def hf_config(folder: Path) -> None:
    """config.json of Hugging Face; what is accepted is an architecture that says its own size."""
    asdict(read_hf_config(folder))
    end_ids(folder)


def run_config(folder: Path) -> None:
    """config.yaml of a run folder."""
    run_configuration(folder)
    run_architecture(folder)


READERS: dict[str, tuple[str, Reader]] = {
    "checkpoint_manifest": ("step=1.manifest.json", checkpoint_manifest),
    "dataset_card": ("dataset.json", dataset_card),
    "litdata_index": ("index.json", litdata_index),
    "tokenizer": ("tokenizer.json", tokenizer),
    "tokenizer_config": ("tokenizer_config.json", tokenizer_config),
    "safetensors_file": ("model.safetensors", safetensors_file),
    "weights_index": ("model.safetensors.index.json", weights_index),
    "torch_pickle": ("pytorch_model.bin", torch_pickle),
    "hf_config": ("config.json", hf_config),
    "run_config": ("config.yaml", run_config),
}
"""Name -> the file that is fuzzed, and what reads it."""


def read(name: str, content: bytes, folder: Path) -> bool:
    """Give bytes to a reader; whether it accepted them.

    Raises:
        Exception: a finding.
    """
    file, reader = READERS[name]
    (folder / file).write_bytes(content)
    try:
        reader(folder)
    except UserError as error:
        check_line(str(error))
        return False
    return True


def check_line(text: str) -> None:
    """Whether a message is one line, as it will be printed."""
    assert 0 < len(one_line(text)) <= LONGEST_LINE, text[:300]
