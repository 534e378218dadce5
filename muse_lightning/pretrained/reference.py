"""A model by reference: a Hugging Face folder, a run folder or a .ckpt, wherever a model is named."""

from dataclasses import dataclass
from pathlib import Path

import torch

from muse_lightning.attention import exact_attention
from muse_lightning.checkpoints.choice import damage_of
from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.errors import UserError
from muse_lightning.files import expand_home, read_json
from muse_lightning.model.assign import assign
from muse_lightning.model.config import LlamaConfig
from muse_lightning.model.hf import config_from_hf
from muse_lightning.model.llama import AttentionFactory, Llama
from muse_lightning.pretrained.run_folder import (
    CONFIG_FILE,
    is_sharded,
    newest_checkpoint,
    open_checkpoint,
    run_architecture,
    run_of,
)
from muse_lightning.pretrained.run_tokenizer import run_tokenizer
from muse_lightning.pretrained.tensors import EMBEDDING, TensorStore, check_shapes, open_folder, open_safetensors
from muse_lightning.pretrained.tokenizer_files import folder_tokenizer

HF_CONFIG_FILE = "config.json"
ACCEPTED = "a Hugging Face folder, a run folder or a .ckpt of one"


@dataclass(frozen=True)
class ModelReference:
    """A model on disk, of which nothing but descriptions has been read.

    Attributes:
        path: As given.
        config: Its architecture.
        tensors: Its weights, under the names of `Llama.state_dict()`; all there, in the shapes of `config`.
        folder: The Hugging Face folder or the run folder that it belongs to.
        is_run: Which of the two that is.
    """

    path: Path
    config: LlamaConfig
    tensors: TensorStore
    folder: Path
    is_run: bool

    def load_tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None where a folder has none.

        Raises:
            UserError: the tokenizer cannot be read, or has ids that the model lacks.
        """
        return (run_tokenizer if self.is_run else folder_tokenizer)(self.folder, self.config)

    def load(
        self,
        attention: AttentionFactory | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Llama:
        """The model in evaluation mode, its weights loaded tensor by tensor.

        Args:
            attention: what each layer does with q, k, v; None: exactly what the architecture means.
            device: where it shall live.
            dtype: of its parameters; None: that of the stored embedding.
        """
        with torch.device("meta"):
            llama = Llama(self.config, attention or exact_attention(self.config.sliding_window))
        llama.to(dtype or self.tensors.dtype(EMBEDDING)).to_empty(device=device)
        copy_weights(llama, self.tensors)
        return llama.eval()


def open_model(reference: str | Path) -> ModelReference:
    """Open a model.

    Args:
        reference: a Hugging Face folder (config.json and weights), a run folder (its newest checkpoint), or a .ckpt
            that lies in a run folder.
    Raises:
        UserError: nothing there, or none of these; an architecture that this implementation lacks; weights that are
            damaged or do not fit it.
    """
    path = expand_home(reference)
    is_run = not (path / HF_CONFIG_FILE).is_file()
    weights = _checkpoint(path, "model") if is_run else path
    folder = run_of(weights) if is_run else path
    config = run_architecture(folder) if is_run else read_hf_config(folder)
    tensors = open_weights(weights, "model")
    if config.tie_word_embeddings:
        tensors = tensors.tied(str(path))
    check_shapes(model_shapes(config), tensors.shapes(), str(path), "its configuration")
    return ModelReference(path, config, tensors, folder, is_run)


def open_weights(path: Path, key: str) -> TensorStore:
    """The weights alone, which need no description of the architecture: beside what `open_model` takes, any .ckpt, a
    .safetensors file, or a folder of them.

    Args:
        path: where they are.
        key: the option that names it, for messages.
    Raises:
        UserError: nothing there, or none of these.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return open_safetensors(path)
    if path.is_dir() and not (path / CONFIG_FILE).is_file() and not is_sharded(path):
        return open_folder(path)
    return open_checkpoint(_checkpoint(path, key))


def known_config(path: Path) -> LlamaConfig | None:
    """The architecture that weights were trained with, where something beside them says so and is understood."""
    try:
        if (path / HF_CONFIG_FILE).is_file():
            return read_hf_config(path)
        return run_architecture(run_of(_checkpoint(path, "model")))
    except UserError:
        return None


def _checkpoint(path: Path, key: str) -> Path:
    """The checkpoint that a run folder or a .ckpt stands for."""
    if is_sharded(path):
        raise UserError(f"{key}: {path} is a checkpoint in shards; accepted: one in a file, or a Hugging Face folder")
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return newest_checkpoint(path)
        versions = sorted(path.glob(f"version_*/{CONFIG_FILE}"), key=lambda file: file.stat().st_mtime)
        hint = f"; nearest: {versions[-1].parent}" if versions else ""
        raise UserError(f"{key}: {path} has neither {HF_CONFIG_FILE} nor {CONFIG_FILE}; accepted: {ACCEPTED}{hint}")
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; accepted: {ACCEPTED}")
    if path.suffix != ".ckpt":
        raise UserError(f"{key}: {path} is neither a folder nor a .ckpt; accepted: {ACCEPTED}")
    problem = damage_of(path)
    if problem is not None:
        raise UserError(f"{key}: {path} is damaged: {problem}; give another checkpoint, or its run folder")
    return path


def read_hf_config(folder: Path) -> LlamaConfig:
    """The architecture of a Hugging Face folder.

    Raises:
        UserError: config.json is not JSON, or of an architecture that this implementation lacks.
    """
    path = folder / HF_CONFIG_FILE
    try:
        fields = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return config_from_hf(fields, str(path))


def model_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Shape of every tensor of a model."""
    with torch.device("meta"):
        state = Llama(config, exact_attention(None)).state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


@torch.no_grad()
def copy_weights(llama: Llama, tensors: TensorStore) -> None:
    """Fill every parameter, tensor by tensor. Shapes must have been checked."""
    for name, parameter in llama.named_parameters():
        assign(parameter, tensors[name])
