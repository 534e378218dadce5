"""Trains the tiny model on two CPU processes, of which one alone is spoilt, then verifying each step and none spoilt;
saves what each step left, in FOLDER/bad and FOLDER/verified.

usage: python -m tests.numerics.two_ranks FOLDER STRATEGY

STRATEGY: ddp or sharded.
"""

import sys
from pathlib import Path

import lightning as L
import torch

from tests.distributed.train_tiny import Sharded, strategy
from tests.numerics.planting import CLIP, LOSS, OPTIONS, Plant, Planter, guarded
from tests.tiny import batches, tiny_model, tiny_trainer

PLANTS = {4: Plant("llama.model.layers.0.mlp"), 6: Plant(LOSS), 7: Plant("llama.model.norm", "backward")}
STEPS = 8
ACCUMULATE = 2


def train(folder: Path, name: str, verify_every: int | None) -> None:
    folder.mkdir(exist_ok=True)
    L.seed_everything(3, verbose=False)
    planter = Planter({} if verify_every else PLANTS, micro_batch=1, rank=1)
    guard = guarded(folder, verify_every=verify_every)
    trainer = tiny_trainer(
        folder,
        devices=2,
        strategy=strategy(name),
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        max_steps=STEPS,
        callbacks=[planter, guard],
        logger=False,
        use_distributed_sampler=False,
    )
    trainer.fit(tiny_model(**OPTIONS), Sharded(batches(2 * ACCUMULATE * STEPS, batch_size=1)))
    torch.save({"states": planter.states, "counters": guard.state_dict()}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, verify_every in (("bad", None), ("verified", 1)):
        train(Path(sys.argv[1]) / name, sys.argv[2], verify_every)
