"""Times against a clock that the test sets."""

import itertools

import pytest

import muse_lightning.callbacks.step_time as step_time
from muse_lightning.callbacks import StepTime
from tests.tiny import TinyData, batches, scalars, tiny_model, tiny_trainer

SLOW_FROM = 16
"""Looks at the clock in two steps of two micro-batches: data, forward, backward, end."""


def seconds(look):
    return float(look + 9 * max(0, look - SLOW_FROM))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes one second with each look at it, and ten after SLOW_FROM looks."""
    looks = itertools.count()
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: seconds(next(looks)))


def test_phases_of_a_step_add_up(tmp_path, clock):
    trainer = tiny_trainer(
        tmp_path, max_steps=4, accumulate_grad_batches=2, log_every_n_steps=2, callbacks=[StepTime()]
    )
    trainer.fit(tiny_model(), TinyData(batches(8)))
    found = {tag: [value for _, value in values] for tag, values in scalars(trainer).items() if tag.startswith("time/")}
    # One second per phase and micro-batch, and one after the backward pass of the micro-batch that only accumulates.
    assert found == {
        "time/data": [2, 20],
        "time/forward": [2, 20],
        "time/backward": [2, 20],
        "time/optimizer": [1, 10],
        "time/step": [8, 80],
    }


def test_validation_is_not_waiting_for_data(tmp_path, clock):
    trainer = tiny_trainer(tmp_path, max_steps=2, val_check_interval=1, callbacks=[StepTime()])
    trainer.fit(tiny_model(), TinyData(batches(2), batches(1)))
    assert [value for _, value in scalars(trainer)["time/data"]] == [1, 1]
