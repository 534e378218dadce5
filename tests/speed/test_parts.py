"""Parts of a step: together they are the step's work; each runs and gives gradients."""

from collections.abc import Mapping

import pytest
import torch

from muse_lightning.measure.bench.timing import Ceilings, Run, Timing
from muse_lightning.measure.flops import attention_flops_per_token, training_flops_per_token
from muse_lightning.parallelize import Recompute
from muse_lightning.speed.batches import random_batch
from muse_lightning.speed.parts import Part, time_parts
from muse_lightning.training.optim import OptimizerName
from tests.tiny import SEQ_LEN, VOCAB, tiny_model, tiny_muse

CEILINGS = Ceilings(flops_per_s=1e9, bytes_per_s=1e9)


class Milliseconds:
    """Instruments by which a forward pass takes 1 ms, forward and backward 3."""

    device = "cpu"

    def time(self, runs: Mapping[str, Run]) -> dict[str, Timing]:
        for run in runs.values():
            run()
        return {name: Timing.of([1.0 if name.endswith("forward") else 3.0]) for name in runs}

    def peak_bytes(self, run: Run) -> int:
        raise NotImplementedError

    def kernel_times(self, run: Run) -> dict[str, float]:
        raise NotImplementedError


def parts(
    recompute: Recompute, documents: tuple[int, ...] | None = None, optimizer: OptimizerName = "adamw"
) -> dict[str, Part]:
    model = tiny_model(attention=tiny_muse, optimizer=optimizer)
    model.configure_model()
    batch = random_batch(VOCAB, 2, SEQ_LEN, documents)
    found = time_parts(model, batch, recompute, Milliseconds(), CEILINGS, torch.bfloat16)
    return {part.name: part for part in found}


def test_layers_of_each_kind_are_timed_apart() -> None:
    """Their work, too, is that of the step; what is computed again counts for each."""
    config = {"num_hidden_layers": 5}
    model = tiny_model(attention=tiny_muse, exact_layers=(0, -1), config=config)
    model.configure_model()
    batch = random_batch(VOCAB, 2, SEQ_LEN, None)
    found = {part.name: part for part in time_parts(model, batch, "block", Milliseconds(), CEILINGS, torch.bfloat16)}
    assert "attention" not in found
    assert (found["attention, Dense"].ms, found["attention, Muse"].ms) == (2 * 4.0, 3 * 4.0)
    for name, layers, alone in (("Dense", 2, (0, 1, 2, 3, 4)), ("Muse", 3, ())):
        model = tiny_model(attention=tiny_muse, exact_layers=alone, config=config)
        flops = attention_flops_per_token(model.llama, [SEQ_LEN] * 2) * 2 * SEQ_LEN
        assert found[f"attention, {name}"].flops == pytest.approx(flops * layers / 5 * 4 / 3)


def test_layers_with_as_many_exact_heads_are_timed_together() -> None:
    model = tiny_model(attention=tiny_muse, exact_heads=4, config={"num_hidden_layers": 3})
    model.configure_model()
    batch = random_batch(VOCAB, 2, SEQ_LEN, None)
    found = {part.name: part for part in time_parts(model, batch, "none", Milliseconds(), CEILINGS, torch.bfloat16)}
    names = ["attention, Muse beside 1 exact key-value head", "attention, Muse beside 2 exact key-value heads"]
    assert [found[name].ms for name in names] == [2 * 3.0, 3.0]
    flops = attention_flops_per_token(model.llama, [SEQ_LEN] * 2) * 2 * SEQ_LEN
    assert sum(found[name].flops for name in names) == pytest.approx(flops)


@pytest.mark.parametrize("documents", [None, (30, 18)], ids=["rows", "documents"])
def test_their_work_is_that_of_the_step(documents: tuple[int, ...] | None) -> None:
    found = parts("none", documents)
    model = tiny_model(attention=tiny_muse)
    lengths = [SEQ_LEN] * 2 if documents is None else list(documents) * 2
    expected = training_flops_per_token(model.llama, lengths, has_documents=documents is not None) * 2 * SEQ_LEN
    assert sum(part.flops for part in found.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recompute", "again"),
    [
        ("none", ()),
        ("keep_attention", ("before attention", "after attention")),
        ("block", ("before attention", "attention", "after attention")),
    ],
)
def test_what_is_computed_again_counts(recompute: Recompute, again: tuple[str, ...]) -> None:
    found = parts(recompute)
    layers = 2
    for name in ("before attention", "attention", "after attention"):
        assert found[name].ms == layers * (4.0 if name in again else 3.0)
        assert found[name].forward_ms == layers
    plain = parts("none")
    for name, part in found.items():
        assert part.flops == pytest.approx(plain[name].flops * (4 / 3 if name in again else 1))


def test_fractions_of_the_ceilings() -> None:
    found = parts("none")
    head, optimizer = found["head and loss"], found["clipping and optimizer"]
    assert head.flops_fraction == pytest.approx(head.flops / 3e-3 / 1e9)
    model = tiny_model()
    size = sum(parameter.numel() for parameter in model.llama.parameters()) * 28
    assert optimizer.bytes_fraction == pytest.approx(size / 3e-3 / 1e9)
    assert parts("none", optimizer="muon")["clipping and optimizer"].bytes_fraction is None
