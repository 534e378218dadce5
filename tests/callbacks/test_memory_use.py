"""On a processor: the resident memory, and the largest seen."""

import psutil
import pytest
import torch

import muse_lightning.callbacks.memory_use as memory_use
from muse_lightning.callbacks import MemoryUse
from tests.tiny import TinyData, batches, scalars, tiny_model, tiny_trainer


def test_resident_memory_and_its_peak(tmp_path, monkeypatch):
    sizes = iter([2, 5, 3])

    class Process:
        def memory_info(self):
            return psutil._ntuples.pmem(next(sizes) * 1024**3, *[0] * 6)

    monkeypatch.setattr(memory_use.psutil, "Process", Process)
    trainer = tiny_trainer(tmp_path, max_steps=3, accumulate_grad_batches=2, callbacks=[MemoryUse()])
    trainer.fit(tiny_model(), TinyData(batches(6)))
    logged = scalars(trainer)
    assert [value for _, value in logged["memory/allocated_gib"]] == [2, 5, 3]
    assert [value for _, value in logged["memory/peak_gib"]] == [2, 5, 5]
    assert "memory/reserved_gib" not in logged


@pytest.mark.gpu
def test_what_the_allocator_holds(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    trainer = tiny_trainer(tmp_path, max_steps=1, accelerator="gpu", callbacks=[MemoryUse()])
    trainer.fit(tiny_model(), TinyData(batches(1)))
    logged = {tag: values[0][1] for tag, values in scalars(trainer).items() if tag.startswith("memory/")}
    assert 0 < logged["memory/allocated_gib"] <= logged["memory/peak_gib"] <= logged["memory/reserved_gib"]
    assert torch.cuda.max_memory_allocated() >= logged["memory/peak_gib"] * 1024**3
