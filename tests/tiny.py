"""A language model small enough to train in a test, and batches for it in the project's format."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from muse_lightning.attention import AttentionStrategy, Muse
from muse_lightning.model import LlamaConfig
from muse_lightning.training.module import LanguageModel

VOCAB, SEQ_LEN = 32, 48
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_muse(layer: int) -> AttentionStrategy:
    """MuSe that approximates at SEQ_LEN."""
    return Muse(layer, chunk=16, query_cluster=4, key_cluster=4, top_k=1, exact_below=0)


def tiny_model(**options: Any) -> LanguageModel:
    config = LlamaConfig(**(CONFIG | options.pop("config", {})))
    return LanguageModel(config, **({"warmup_steps": 0, "learning_rate": 1e-2, "seq_len": SEQ_LEN} | options))


def batches(count: int, batch_size: int = 2, seed: int = 0, packed: bool = True) -> list[dict[str, Tensor]]:
    """Batches in which rows hold a different number of documents, so that their numbers of labels differ."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        # The power makes low ids frequent: something to learn.
        tokens = (torch.rand(batch_size, SEQ_LEN + 1, generator=generator) ** 4 * VOCAB).long()
        batch = {"input_ids": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone()}
        if packed:
            starts: list[int] = []
            for row in range(batch_size):
                inside = 1 + torch.randperm(SEQ_LEN - 1, generator=generator)[: row + 1].sort().values
                starts += [row * SEQ_LEN, *(row * SEQ_LEN + inside).tolist()]
                batch["labels"][row, inside - 1] = -100  # what would be the first token of the next document
            end = batch_size * SEQ_LEN
            batch["cu_seqlens"] = torch.tensor(starts + [end] * (64 - len(starts)), dtype=torch.int32)
        result.append(batch)
    return result


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements, and of bytes, of any tensor that an operation returns."""

    elements = bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        self.bytes = max([self.bytes, *(tensor.nbytes for tensor in tensors)])
        return result


class BatchLoader:
    """Yields ready batches, and goes on where a checkpoint left off."""

    def __init__(self, items: list[dict[str, Tensor]]) -> None:
        self.items = items
        self.first = self.done = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, self.first = self.first, 0
        for index in range(first, len(self.items)):
            self.done = index + 1
            yield self.items[index]

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = self.done = state["done"]


class TinyData(L.LightningDataModule):
    """Serves ready batches; `token_bytes` as TokenDataModule has it."""

    def __init__(self, train: list[Any], val: list[Any] | None = None, token_bytes: Tensor | None = None) -> None:
        super().__init__()
        self.train, self.val = train, val or []
        if token_bytes is not None:
            self.token_bytes = token_bytes

    def train_dataloader(self) -> BatchLoader:
        return BatchLoader(self.train)

    def val_dataloader(self) -> BatchLoader:
        return BatchLoader(self.val)

    test_dataloader = predict_dataloader = val_dataloader


def tiny_trainer(folder: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": TensorBoardLogger(folder, name="run"),
        "max_epochs": -1,
        "max_steps": 4,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**(defaults | options))


def scalars(trainer: L.Trainer) -> dict[str, list[tuple[int, float]]]:
    """What a finished run logged, read back from its event files: tag -> [(step, value)]."""
    # Not trainer.log_dir: it waits for all ranks.
    assert isinstance(trainer.logger, TensorBoardLogger)
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
