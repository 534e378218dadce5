"""Validates the tiny model on CPU processes with every long-context evaluation, and saves what it logged.

usage: python validate_tiny.py FOLDER DEVICES RANKS_PER_BLOCK

Each validation sees the same batches whatever the split. They are unlike: of one document or two, with names to recall
or without, one without a needle: means of means would show.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from muse_lightning.callbacks import (
    LONG_CONTEXT_CALLBACKS,
    ContextGain,
    FutureGain,
    IdentifierRecall,
    LossByPosition,
    NeedleRetrieval,
)
from muse_lightning.data.tokenizer import ByteTokenizer
from tests.distributed.train_tiny import Sharded
from tests.tiny import scalars, tiny_model, tiny_muse, tiny_trainer

N = 160


class Data(Sharded):
    """Every rank's share of the batches, and the tokenizer they are of."""

    tokenizer = ByteTokenizer()
    token_bytes = torch.from_numpy(tokenizer.token_bytes)


def batch(*rows: str) -> dict[str, Tensor]:
    """A batch of texts, in which \\x01 opens a file and \\x02 ends a document."""
    ids = [[{"\x01": 257, "\x02": 258}.get(char, ord(char)) for char in row.ljust(N + 1, "#")[: N + 1]] for row in rows]
    tokens = torch.tensor(ids)
    starts = [0]
    for row, text in enumerate(rows):
        starts += [row * N + place + 1 for place, char in enumerate(text) if char == "\x02"] + [(row + 1) * N]
    cu_seqlens = torch.tensor(starts + starts[-1:] * (64 - len(starts)), dtype=torch.int32)
    return {"input_ids": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone(), "cu_seqlens": cu_seqlens}


def repository(name: str, uses: int) -> str:
    """Two files, of which the second uses some names of the first, and a new one."""
    defined = "".join(f"def {name}_{i}(x): {i}\n" for i in range(3))
    used = "".join(f"y = {name}_{i}\n" for i in range(uses))
    return f"\x01a.py\n{defined}\x01b.py\n{used}z = new_{name}\n"


def main(folder: Path, devices: int, ranks_per_block: int) -> None:
    torch.set_num_threads(1)
    L.seed_everything(3, verbose=False)
    config = {"vocab_size": 259, "max_position_embeddings": N, "initializer_range": 0.5}
    model = tiny_model(config=config, attention=tiny_muse, seq_len=N, exact_val_batches=0)
    per_rank = 2 * ranks_per_block // devices
    callbacks = [
        LossByPosition(short_context=20),
        ContextGain(batches=per_rank),
        NeedleRetrieval(needle_tokens=16, batches=per_rank, min_share=0.6),
        IdentifierRecall(min_distance=8, batches=per_rank),
        FutureGain(batches=per_rank, tokens=8),
    ]
    assert len(callbacks) == 2 + len(LONG_CONTEXT_CALLBACKS)
    trainer = tiny_trainer(
        folder,
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    val = [
        batch(repository("load_all", 3), "another text\n\x02" + repository("save", 0)),
        batch(repository("parse", 1), "a = 1\n" * 13 + "\x02" + "bcdefghij = 2\n" * 5 + "klm = 3\n" * 5),
    ]
    data = Data([], val)
    data.ranks_per_block = ranks_per_block
    trainer.validate(model, data, verbose=False)
    if trainer.is_global_zero:
        torch.save(scalars(trainer), folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
