"""Trains the tiny model on CPU processes, once for each way, and saves what came of it in FOLDER/STRATEGY/OPTIMIZER.

usage: python -m tests.distributed.train_tiny FOLDER DEVICES ACCUMULATE STRATEGY/OPTIMIZER ...

STRATEGY: auto, ddp, sharded or sharded-recompute.

Each optimizer step sees the same batches whatever the split: device d of n takes batches d, d + n, ... in order.
"""

import sys
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor

from muse_lightning.callbacks import ContextWarmup, ExactHeads, exact_heads
from muse_lightning.measure.attention_error import errors_by_head
from muse_lightning.training.optim import OptimizerName
from muse_lightning.training.sharded import ShardedStrategy
from tests.tiny import BatchLoader, TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer

TAGS = ("train/loss", "train/tokens", "train/context", "val/loss", "val/loss_exact", "val/bpb")


class Sharded(TinyData):
    """Every rank's share of the batches."""

    ranks_per_block = 1

    def _share(self, items: list) -> BatchLoader:
        assert self.trainer is not None
        readers = self.trainer.world_size // self.ranks_per_block
        return BatchLoader(items[self.trainer.global_rank // self.ranks_per_block :: readers])

    def train_dataloader(self) -> BatchLoader:
        return self._share(self.train)

    def val_dataloader(self) -> BatchLoader:
        return self._share(self.val)


def strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name.startswith("sharded"):
        return ShardedStrategy(process_group_backend="gloo")
    return name


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


MEASURED: list[torch.Tensor] = []
"""What `errors_by_head` found of a training, on this rank."""


def errors_by_rank(*inputs: Any) -> torch.Tensor:
    """In place of the errors that are measured: on rank 0 the first head has the largest, on average the second."""
    measured = errors_by_head(*inputs)
    MEASURED.append(measured)
    is_alone = not torch.distributed.is_initialized()
    own = [0.25, 0.4] if is_alone else [[0.5, 0.4], [0.0, 0.4]][torch.distributed.get_rank()]
    return torch.tensor([own]).expand_as(measured).clone()


def train(folder: Path, devices: int, accumulate: int, name: str, optimizer: OptimizerName) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    MEASURED.clear()
    L.seed_everything(3, verbose=False)
    recompute = "block" if name.endswith("recompute") else "none"
    model = tiny_model(
        attention=tiny_muse,
        exact_layers=(0,),
        exact_heads=1,
        optimizer=optimizer,
        exact_val_batches=1 if devices == 2 else 2,
        recompute=recompute,
    )
    trainer = tiny_trainer(
        folder,
        devices=devices,
        strategy=strategy(name),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        max_steps=4,
        val_check_interval=4 * accumulate,
        use_distributed_sampler=False,
        # Pieces of 12, of 24, and twice whole rows.
        callbacks=[ContextWarmup(steps=2, start=12), ExactHeads(every_n_steps=3)],
    )
    # Batches of unequal numbers of labels, of one row and of two: means of means would show.
    train = [batch for seed in range(4) for batch in (*batches(1, 1, seed), *batches(1, 1, 10 + seed))]
    val = [*batches(1, 2, 20), *batches(1, 1, 21), *batches(1, 1, 22), *batches(1, 2, 23)]
    trainer.fit(model, Sharded(train, val, token_bytes=torch.arange(model.config.vocab_size)))
    assert [strategy.heads for strategy in model.partly_exact] == [(1,)]
    # Gathered by all processes together.
    parameters = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    if trainer.is_global_zero:
        logged = scalars(trainer)
        found = {
            "logged": {tag: logged[tag] for tag in TAGS},
            "parameters": parameters,
            "errors": torch.stack(MEASURED),
        }
        torch.save(found, folder / "result.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    exact_heads.errors_by_head = errors_by_rank
    for way in sys.argv[4:]:
        name, optimizer = way.split("/")
        folder = Path(sys.argv[1]) / way
        train(folder, int(sys.argv[2]), int(sys.argv[3]), name, cast(OptimizerName, optimizer))
