"""Trains the tiny model on two CPU processes, of which one alone is spoilt (or, if steps are verified, none), and
saves what each step left.

usage: python -m tests.numerics.two_ranks FOLDER STRATEGY VERIFY_EVERY

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


def main(folder: Path, name: str, verify_every: int) -> None:
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    planter = Planter({} if verify_every else PLANTS, micro_batch=1, rank=1)
    guard = guarded(folder, verify_every=verify_every or None)
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
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
