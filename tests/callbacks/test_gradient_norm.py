"""The norm is that of the whole step, before clipping."""

import pytest
import torch

from muse_lightning.callbacks import GradientNorm
from tests.tiny import TinyData, batches, scalars, tiny_model, tiny_trainer


def test_norm_of_the_accumulated_gradient_before_clipping(tmp_path):
    data = batches(2)
    torch.manual_seed(0)
    reference = tiny_model()
    reference.configure_model()
    for batch in data:
        (reference.total_nats(batch) / batch["labels"].numel() / 2).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()]).norm().item()

    torch.manual_seed(0)
    trainer = tiny_trainer(
        tmp_path, max_steps=1, accumulate_grad_batches=2, gradient_clip_val=expected / 10, callbacks=[GradientNorm()]
    )
    trainer.fit(tiny_model(), TinyData(data))
    [(_, found)] = scalars(trainer)["train/grad_norm"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_only_at_logged_steps(tmp_path):
    found = []
    for interval in (1, 2):
        torch.manual_seed(0)
        trainer = tiny_trainer(tmp_path / str(interval), log_every_n_steps=interval, callbacks=[GradientNorm()])
        trainer.fit(tiny_model(), TinyData(batches(4)))
        found.append(dict(scalars(trainer)["train/grad_norm"]))
    assert found[1] == {step: found[0][step] for step in (1, 3)}
