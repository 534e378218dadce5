"""What the guard counts, logs and stops at, and what it leaves for the replay."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.errors import NumericsError, UserError
from muse_lightning.numerics.failed_step import KEY, read_failed_step
from muse_lightning.numerics.guard import NumericsGuard
from tests.numerics.planting import OPTIONS, Plant, Planter, guarded
from tests.tiny import TinyData, batches, scalars, tiny_model, tiny_trainer

MLP = Plant("llama.model.layers.1.mlp")


def fit(
    folder: Path, guard: NumericsGuard, plants: dict[int, Plant], steps: int = 10, **options: Any
) -> tuple[L.Trainer, Planter]:
    torch.manual_seed(0)
    accumulate = options.get("accumulate_grad_batches", 1)
    planter = Planter(plants, micro_batch=accumulate - 1)
    callbacks = [guard, planter, *options.pop("callbacks", [])]
    ckpt_path = options.pop("ckpt_path", None)
    trainer = tiny_trainer(folder, max_steps=steps, callbacks=callbacks, **options)
    try:
        data = TinyData(batches(steps * accumulate, batch_size=1))
        trainer.fit(tiny_model(**OPTIONS), data, ckpt_path=ckpt_path, weights_only=True)
    finally:
        guard.planter = planter
    return trainer, planter


def test_counters_are_logged_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = fit(tmp_path, guarded(stop_after=3), {2: MLP, 3: MLP, 5: MLP}, steps=6)
    found = scalars(trainer)
    assert [value for _, value in found["train/skipped_steps"]] == [0, 1, 2, 2, 3, 3]
    assert [value for _, value in found["train/consecutive_skipped_steps"]] == [0, 1, 2, 0, 1, 0]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("numerics: ")]
    assert [line.split(" skipped: ")[0] for line in lines] == [f"numerics: step {step}" for step in (2, 3, 5)]
    assert lines[1].endswith("loss nan, gradient norm nan; 2 in a row, of 3 at most, 2 in all")


def test_what_the_host_counts_goes_on(tmp_path: Path) -> None:
    options = {"log_every_n_steps": 1}
    (skipping, _), (plain, _) = (fit(tmp_path / n, guarded(), p, 6, **options) for n, p in (("a", {3: MLP}), ("b", {})))
    assert skipping.global_step == plain.global_step == 6
    assert scalars(skipping)["train/tokens"] == scalars(plain)["train/tokens"]
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in (skipping, plain)]
    assert rates[0] == rates[1] != OPTIONS["learning_rate"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("is_last", [False, True], ids=["with steps left", "at the end"])
def test_stops_after_so_many_in_a_row(tmp_path: Path, accumulate: int, is_last: bool) -> None:
    guard = guarded(tmp_path / "numerics", stop_after=3)
    # The next one is finite, and not taken: it would change the weights before the host knows.
    plants = dict.fromkeys((2, 4, 5, 6), MLP)
    message = (
        "3 steps in a row had no finite loss and gradient; step 4 is saved: muse fit --replay "
        f"{tmp_path}/numerics/step=4.replay.ckpt"
    )
    steps = 6 if is_last else 10
    with pytest.raises(NumericsError) as found:
        fit(
            tmp_path,
            guard,
            plants,
            steps,
            plugins=[DurableCheckpointIO()],
            accumulate_grad_batches=accumulate,
        )
    assert str(found.value) == message
    states = guard.planter.states
    assert len(states) in (6, 7)
    checkpoint = read_failed_step(tmp_path / "numerics" / "step=4.replay.ckpt")
    # Of the step before the first that was skipped.
    for name, tensor in checkpoint["state_dict"].items():
        if name in states[2]:  # the tied head is not
            assert torch.equal(tensor, states[2][name]), name
    [state] = checkpoint["optimizer_states"]
    assert {int(each["step"]) for each in state["state"].values()} == {2}
    step = checkpoint[KEY]
    assert (step["step"], step["consecutive_skipped_steps"], step["accumulate"]) == (4, 1, accumulate)
    assert math.isnan(step["loss"])
    assert math.isnan(step["gradient_norm"])
    [micro_batches] = step["ranks"]
    data = batches(steps * accumulate, batch_size=1)[3 * accumulate : 4 * accumulate]
    assert len(micro_batches) == accumulate
    for found_batch, batch in zip(micro_batches, data, strict=True):
        assert found_batch["batch"].keys() == batch.keys()
        assert all(torch.equal(found_batch["batch"][name], batch[name]) for name in batch)


def test_a_row_goes_on_after_a_restart(tmp_path: Path) -> None:
    """The counters are in the checkpoint: two skipped before it and one after it are three."""
    plants = dict.fromkeys((1, 3, 4, 5, 6), MLP)
    save = DurableCheckpoint(tmp_path / "checkpoints", every_n_steps=4, is_asynchronous=False)
    fit(tmp_path, guarded(stop_after=5), plants, 4, callbacks=[save], enable_checkpointing=True)
    path = tmp_path / "checkpoints" / "step=4.ckpt"
    stored = torch.load(path, weights_only=True)["callbacks"]["NumericsGuard"]
    assert stored == {"consecutive_skipped_steps": 2, "skipped_steps": 3}
    guard = guarded(tmp_path / "numerics", stop_after=3)
    with pytest.raises(NumericsError, match=r"3 steps in a row .* step 5 is saved"):
        fit(tmp_path, guard, plants, 8, ckpt_path=path)
    whole = guarded()
    fit(tmp_path, whole, {1: MLP, 3: MLP, 4: MLP, 6: MLP}, 7)
    resumed = guarded()
    fit(tmp_path, resumed, {6: MLP}, 7, ckpt_path=path)
    assert resumed.state_dict() == whole.state_dict() == {"consecutive_skipped_steps": 0, "skipped_steps": 4}


class _Breaks(L.Callback):
    """Ends a training between a backward pass and its step."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 2:
            raise InterruptedError


def test_a_training_that_broke_off_leaves_nothing_to_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = guarded()
    with pytest.raises(InterruptedError):
        fit(tmp_path, guard, {1: MLP}, callbacks=[_Breaks()])
    fit(tmp_path, guard, {1: MLP}, 3)
    assert capsys.readouterr().err.count("numerics: step 1 skipped: ") == 2
    assert guard.state_dict() == {"consecutive_skipped_steps": 0, "skipped_steps": 2}


def test_storage_that_takes_nothing_does_not_hide_why_the_run_ended(tmp_path: Path) -> None:
    (tmp_path / "numerics").write_text("a file where the folder would be")
    guard = guarded(tmp_path / "numerics", stop_after=1)
    with pytest.raises(NumericsError, match=r"1 steps in a row .* could not be saved: "):
        fit(tmp_path, guard, {2: MLP}, plugins=[DurableCheckpointIO()])


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "is_bad"),
    [
        (1.0, math.inf, 65536.0, False),
        (1.0, math.nan, 2.0, False),
        (1.0, math.inf, 1.0, True),
        (math.nan, 1.0, 65536.0, True),
        (1.0, 1.0, 1.0, False),
        (1.0, math.inf, None, True),
    ],
)
def test_an_overflow_is_the_loss_scalers(
    tmp_path: Path, loss: float, norm: float, scale: float | None, is_bad: bool
) -> None:
    trainer: Any = tiny_trainer(tmp_path)
    if scale is not None:
        trainer.precision_plugin.scaler = SimpleNamespace(_scale=torch.tensor(scale))
    guard = guarded()
    # What the hook gets is multiplied already.
    guard.on_before_backward(trainer, tiny_model(), torch.tensor(loss) * (scale or 1.0))
    assert guard._loss is not None
    found, mean = guard._judge(trainer, guard._loss, torch.tensor(norm))
    assert (found.item(), found.dtype) == (float(is_bad), torch.float32)
    assert mean.item() == pytest.approx(loss, nan_ok=True)


class _Reads(TorchDispatchMode):
    """Counts tensors whose value the host asks for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_asks_for_a_value(tmp_path: Path) -> None:
    """On a GPU each would wait for the device; there, the same with PyTorch's own check (test_skipping.py)."""
    counts = []
    for guard in ([guarded()], []):
        torch.manual_seed(0)
        callbacks = [Planter({2: MLP, 4: MLP}) if guard else Planter({}), *guard]
        trainer = tiny_trainer(tmp_path, max_steps=6, callbacks=callbacks, logger=False, log_every_n_steps=0)
        with _Reads() as reads:
            trainer.fit(tiny_model(**OPTIONS), TinyData(batches(6, batch_size=1)))
        counts.append(reads.count)
    # Two counters become numbers where the training starts or ends, never in between.
    assert counts[0] <= counts[1] + 2


@pytest.mark.parametrize("name", ["stop_after", "verify_every"])
def test_values_out_of_range(name: str) -> None:
    with pytest.raises(UserError, match=f"NumericsGuard: {name} is 0; accepted: at least 1"):
        NumericsGuard(**{name: 0})
