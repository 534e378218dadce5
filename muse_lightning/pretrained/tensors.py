"""Tensors of a checkpoint on disk, read one at a time: safetensors, or a pickle of tensors alone."""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from muse_lightning.errors import UserError
from muse_lightning.files import is_file_name, read_json

SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers of old checkpoints that follow from the configuration.
_IGNORED = ".rotary_emb.inv_freq"
_OLD_FORMAT = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How torch.save's files began before they were archives."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its shape and dtype, and how to read it."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


class TensorStore(Mapping[str, Tensor]):
    """Tensors by name: `store[name]` reads that tensor alone, which may be mapped from its file; keep no reference to
    many of them."""

    def __init__(self, entries: Mapping[str, StoredTensor]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, which is not read."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, which is not read."""
        return self._entries[name].dtype

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def tied(self, source: str) -> "TensorStore":
        """The tensors of a model whose head is its embedding: Hugging Face leaves the head out, or writes it as well.

        Args:
            source: where they come from, for the message.
        Raises:
            UserError: there is a head that differs from the embedding.
        """
        if EMBEDDING not in self:
            return self
        if HEAD in self and not torch.equal(self[HEAD], self[EMBEDDING]):
            raise UserError(f"{source} has a head of its own: config.tie_word_embeddings is true; accepted: false")
        return TensorStore(self._entries | {HEAD: self._entries[EMBEDDING]})

    def without_prefix(self, prefix: str) -> "TensorStore":
        """The tensors whose names begin so, under the rest of their names."""
        found = {name.removeprefix(prefix): entry for name, entry in self._entries.items() if name.startswith(prefix)}
        return TensorStore(found)


def open_folder(folder: Path) -> TensorStore:
    """Tensors of a Hugging Face folder: model.safetensors, its sharded form, or, where there is neither, the pickle.

    Raises:
        UserError: nothing there; a shard is missing, cut short or lacks a tensor of the index; an index that is broken
            or names files elsewhere; a pickle of anything but tensors; a dtype that is not accepted.
    """
    for name, open_file in ((SAFETENSORS_FILE, open_safetensors), (PICKLE_FILE, open_pickle)):
        if (folder / name).is_file():
            return open_file(folder / name)
        if (folder / (name + INDEX_SUFFIX)).is_file():
            return _open_shards(folder / (name + INDEX_SUFFIX), open_file)
    raise UserError(
        f"no weights at {folder}; accepted: a folder with {SAFETENSORS_FILE} or {PICKLE_FILE}, whole or in shards"
    )


def open_safetensors(file: Path) -> TensorStore:
    """Tensors of one .safetensors file.

    Raises:
        UserError: it is not one, it is cut short, or a dtype is not accepted.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            described = {name: (found.get_shape(), found.get_dtype()) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not readable as safetensors: {_first_line(error)}") from None
    return TensorStore(
        {
            name: StoredTensor(torch.Size(shape), _accepted(dtype, name, file), partial(_read_safetensor, file, name))
            for name, (shape, dtype) in described.items()
            if not name.endswith(_IGNORED)
        }
    )


def _read_safetensor(file: Path, name: str) -> Tensor:
    # Opened for each tensor: the pages of a mapping stay in memory as long as it does.
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {name} cannot be read any more: {_first_line(error)}") from error


def open_pickle(file: Path, *, key: str = "", wanted: str = "a file of torch.save with tensors alone") -> TensorStore:
    """Tensors of a pickled state dict, of which nothing but tensors and plain values is unpickled.

    Args:
        file: a file of torch.save.
        key: the entry that holds the state dict; "" where the file is one.
        wanted: what it should have been, for the message.
    Raises:
        UserError: it is not whole, or holds something else that is pickled.
    """
    found = load_pickle(file, wanted)
    state = found.get(key) if key and isinstance(found, dict) else found
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{file} is not {wanted}: it has no {key or 'state dict'}")
    tensors = {
        name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and not name.endswith(_IGNORED)
    }
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "without values" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise UserError(f"{file}: {name} is a tensor {kind}; accepted: strided ones with values")
    return TensorStore(
        {
            name: StoredTensor(
                tensor.shape, _accepted(tensor.dtype, name, file), partial(_read_pickled, file, wanted, key, name)
            )
            for name, tensor in tensors.items()
        }
    )


def load_pickle(file: Path, wanted: str) -> Any:
    """Content of a file of torch.save; its tensors stay on disk until they are used.

    Raises:
        UserError: it is not whole, or holds something that is neither a tensor nor a plain value.
    """
    what = f"{file} is not {wanted}"
    if not _is_archive(file):
        if _starts_with(file, _OLD_FORMAT):
            raise UserError(
                f"{what}: it has the format of torch before 1.6; accepted: safetensors, or saved by a newer"
            )
        raise UserError(f"{what}: not a whole file of torch.save")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # Not torch's own text: it advises to unpickle everything.
        refused = ", ".join(_refused_globals(file)) or type(error).__name__
        raise UserError(f"{what}: it needs {refused}, which is not run; accepted: safetensors") from None
    except Exception as error:  # whatever a damaged file causes
        raise UserError(f"{what}: {_first_line(error)}") from None


def _read_pickled(file: Path, wanted: str, key: str, name: str) -> Tensor:
    # As for safetensors. What is unpickled each time are names and shapes.
    found = load_pickle(file, wanted)
    tensor: Tensor = (found[key] if key else found)[name]
    return tensor.detach()  # it may be a parameter


def _refused_globals(file: Path) -> list[str]:
    """What a pickle needs that is neither a tensor nor a plain value; nothing where it cannot be told."""
    try:
        return get_unsafe_globals_in_checkpoint(file)
    except Exception:  # whatever a damaged pickle causes
        return []


def _is_archive(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # in place of False, of some damage
        return False


def _starts_with(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError:
        return False


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards names them; all in its own folder.

    Raises:
        UserError: it is not an index, or names files elsewhere.
    """
    try:
        files: dict[str, str] = read_json(index)["weight_map"]
        outside = [name for name in sorted(set(files.values())) if not is_file_name(name)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights: {type(error).__name__}: {_first_line(error)}") from None
    if outside:
        raise UserError(f"{index} names the file {outside[0]!r:.300}; accepted: names of files in its own folder")
    return files


def _open_shards(index: Path, open_file: Callable[[Path], TensorStore]) -> TensorStore:
    """Tensors that an index lists."""
    files = read_index(index)
    shards: dict[str, TensorStore] = {}
    for name in sorted(set(files.values())):
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing; {index.name} names it")
        shards[name] = open_file(index.parent / name)
    for name, file in files.items():
        if name not in shards[file] and not name.endswith(_IGNORED):
            raise UserError(f"{index.parent / file} has no tensor {name}; {index.name} says that it does")
    return TensorStore({name: entry for shard in shards.values() for name, entry in shard._entries.items()})


def check_shapes(
    model: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], source: str, of: str = "this recipe"
) -> None:
    """Refuse weights of another architecture, with the first tensor that tells.

    Args:
        model: shape of each tensor of the model.
        found: shape of each tensor that is to be loaded into it.
        source: where `found` comes from, for the message.
        of: what has made the model, for the message.
    Raises:
        UserError: a tensor is missing, of another shape, or not the model's.
    """
    for name, shape in model.items():
        if name not in found:
            raise UserError(f"{source} has no tensor {name}; the model of {of} needs it, {_text(shape)}")
        if tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{source} is of another shape: {name} is {_text(found[name])} there, {_text(shape)} in {of}"
            )
    for name, shape in found.items():
        if name not in model:
            raise UserError(f"{source} has a tensor {name}, {_text(shape)}, which the model of {of} lacks")


def _accepted(dtype: str | torch.dtype, name: str, file: Path) -> torch.dtype:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise UserError(f"{file}: {name} is of type {dtype}; accepted: float64, float32, float16, bfloat16")
    assert found is not None
    return found


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
