"""When a training saves; that what was saved goes on as if nothing had happened; that it stops when it is asked to."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import FSDPStrategy

from muse_lightning.checkpoints import durable_checkpoint
from muse_lightning.checkpoints.choice import best_checkpoint, last_checkpoint
from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint
from muse_lightning.checkpoints.durable_io import DurableCheckpointIO
from muse_lightning.checkpoints.manifest import Manifest, manifest_path
from muse_lightning.errors import RetryError, StorageError, UserError
from tests.checkpoints.folder import steps
from tests.tiny import TinyData, batches, scalars, tiny_model, tiny_trainer


class StatefulData(TinyData):
    """Batches, and where training stands in them."""

    def state_dict(self) -> dict[str, Any]:
        return {"train": {"batches": self.trainer.fit_loop.total_batch_idx + 1 if self.trainer else 0}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class NoisyModel:
    """Makes a model whose training draws random numbers, as dropout does."""

    def __new__(cls, **options: Any) -> Any:
        model = tiny_model(**({"learning_rate": 3e-3, "warmup_steps": 3} | options))
        step = model.training_step

        def training_step(batch: Any, batch_idx: int) -> torch.Tensor:
            return step(batch, batch_idx) * (1 + torch.rand(()))

        model.training_step = training_step
        return model


class States(L.Callback):
    """What the training state is before each step's batch: parameters, optimizer, schedule, random numbers."""

    def __init__(self) -> None:
        self.by_step: dict[int, list[torch.Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # The model's own hook comes after those of all callbacks.
        pl_module.on_train_batch_start = lambda batch, batch_idx: self.note(trainer, pl_module, batch)

    def note(self, trainer: L.Trainer, pl_module: Any, batch: Any) -> None:
        optimizer = trainer.optimizers[0]
        rates = torch.tensor([group["lr"] for group in optimizer.param_groups])
        moments = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [*pl_module.parameters(), *moments, rates, torch.get_rng_state(), batch["input_ids"]]
        self.by_step[trainer.global_step] = [tensor.detach().clone() for tensor in tensors]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def fit(
    folder: Path, checkpoint: DurableCheckpoint, *callbacks: L.Callback, resume: Path | None = None, **options: Any
) -> L.Trainer:
    torch.manual_seed(0)
    data = options.pop("data", None) or StatefulData(batches(12), batches(1, seed=5))
    model = options.pop("model", None) or NoisyModel()
    # The last, as a user could never have it: others must have seen what it does.
    trainer = tiny_trainer(
        folder, **({"enable_checkpointing": True, "callbacks": [*callbacks, checkpoint], "max_steps": 12} | options)
    )
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("is_asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path, is_asynchronous: bool, accumulate: int) -> None:
    """Bit for bit, from every step, in the first epoch and later ones, also at its end and before a validation: before
    the next step the state is that of the run that has saved and gone on."""
    data = {"accumulate_grad_batches": accumulate, "val_check_interval": 3 * accumulate}

    def make(keep_last: int = 100) -> DurableCheckpoint:
        return DurableCheckpoint(
            tmp_path / "checkpoints", every_n_steps=1, keep_last=keep_last, is_asynchronous=is_asynchronous
        )

    def epochs() -> StatefulData:
        return StatefulData(batches(5 * accumulate), batches(1, seed=5))

    whole = States()
    # Every step: a save that is due waits for the writer, so hold each back until it is done.
    checkpoint = make()
    fit(tmp_path / "whole", checkpoint, whole, AwaitWriter(checkpoint), data=epochs(), **data)
    assert steps(tmp_path / "checkpoints") == list(range(1, 13))
    for step in (1, 3, 5, 7, 10):
        rest = States()
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        fit(tmp_path / f"rest{step}", make(), rest, resume=path, data=epochs(), **data)
        assert sorted(rest.by_step) == list(range(step, 12))
        for number, state in rest.by_step.items():
            assert same(state, whole.by_step[number]), f"from {step}: step {number} differs"


class AwaitWriter(L.Callback):
    """Waits at the start of each batch until the last save is on the disk."""

    def __init__(self, checkpoint: DurableCheckpoint) -> None:
        self.checkpoint = checkpoint

    def on_train_batch_start(self, *args: Any) -> None:
        self.checkpoint._io.wait()


def test_steps_minutes_validations_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Clock(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            nonlocal now
            now = 60.0 * trainer.global_step

    monkeypatch.setattr(durable_checkpoint.time, "monotonic", lambda: now)
    saved = {
        "steps": DurableCheckpoint(tmp_path / "a", every_n_steps=4, every_n_minutes=None, keep_last=100),
        "minutes": DurableCheckpoint(tmp_path / "b", every_n_minutes=2.5, keep_last=100),
        "neither": DurableCheckpoint(tmp_path / "c", every_n_minutes=None, keep_last=100),
    }
    found = {}
    for name, checkpoint in saved.items():
        now = 0.0
        fit(tmp_path / name, checkpoint, Clock(), AwaitWriter(checkpoint), max_steps=11, limit_val_batches=0)
        found[name] = steps(checkpoint.dirpath or Path())
    assert found == {"steps": [4, 8, 11], "minutes": [4, 7, 10, 11], "neither": [11]}
    checkpoint = DurableCheckpoint(tmp_path / "d", keep_last=100)
    fit(tmp_path / "validations", checkpoint, max_steps=11, val_check_interval=3)
    assert steps(tmp_path / "d") == [3, 6, 9, 11]


def test_the_end_that_no_max_steps_has_set(tmp_path: Path) -> None:
    stop = EarlyStopping("train/loss", stopping_threshold=100.0, check_on_train_epoch_end=True)
    data = StatefulData(batches(3))
    fit(tmp_path, DurableCheckpoint(tmp_path / "a", every_n_minutes=None), stop, data=data, limit_val_batches=0)
    assert steps(tmp_path / "a") == [3]
    assert Manifest.read(tmp_path / "a" / "step=3.ckpt").data == {"train": {"batches": 3}}


def test_the_folder_is_the_runs(tmp_path: Path) -> None:
    trainer = fit(tmp_path, DurableCheckpoint(), max_steps=1)
    assert steps(Path(str(trainer.log_dir)) / "checkpoints") == [1]


def test_what_a_validation_measured_is_in_the_manifest(tmp_path: Path) -> None:
    trainer = fit(tmp_path, DurableCheckpoint(tmp_path / "a", keep_last=100), max_steps=12, val_check_interval=4)
    measured = {step + 1: value for step, value in scalars(trainer)["val/loss"]}
    stored = {step: Manifest.read(tmp_path / "a" / f"step={step}.ckpt").metrics["val/loss"] for step in (4, 8, 12)}
    assert stored == pytest.approx(measured)
    best = min(stored, key=lambda step: stored[step])
    assert best_checkpoint(tmp_path / "a") == tmp_path / "a" / f"step={best}.ckpt"


def test_the_next_save_waits_for_the_writer_and_the_training_does_not(tmp_path: Path) -> None:
    may_write = threading.Event()

    class Slow(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 7:
                may_write.set()
                checkpoint._io.wait()

    checkpoint = DurableCheckpoint(tmp_path / "a", every_n_steps=2, keep_last=100)
    checkpoint._io.submit(lambda: may_write.wait(30) and None)
    fit(tmp_path, checkpoint, Slow(), limit_val_batches=0, max_steps=9)
    # 2, 4 and 6 were due while the writer was not free.
    assert steps(tmp_path / "a")[0] == 8


def test_memory_for_the_copy_is_there_before_the_first_save(tmp_path: Path) -> None:
    buffers = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            checkpoint._io.wait()
            buffers[trainer.global_step] = checkpoint._io._host_copy._buffer

    checkpoint = DurableCheckpoint(tmp_path / "a", every_n_steps=4)
    fit(tmp_path, checkpoint, Look(), limit_val_batches=0, max_steps=6)
    size = (tmp_path / "a" / "step=4.ckpt").stat().st_size
    assert len(buffers[0]) == 0
    assert size / 2 < len(buffers[1]) < 2 * size + 2**20
    assert buffers[5] is buffers[1]


def sends(number: int, at_step: int, hook: str = "on_train_batch_start") -> L.Callback:
    """Sends this process a signal in the middle of a step or of a validation."""

    class Sender(L.Callback):
        pass

    def send(self: Any, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == at_step:
            os.kill(os.getpid(), number)

    setattr(Sender, hook, send)
    return Sender()


@pytest.fixture
def handlers() -> Any:
    """Handlers are those from before afterwards."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("is_asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_sigterm_saves_and_stops_and_the_rest_follows(tmp_path: Path, handlers: Any, is_asynchronous: bool) -> None:
    whole, first, rest = States(), States(), States()
    options = {"limit_val_batches": 0, "accumulate_grad_batches": 2, "max_steps": 6}
    fit(tmp_path / "whole", DurableCheckpoint(tmp_path / "a"), whole, **options)
    make = lambda: DurableCheckpoint(tmp_path / "b", every_n_minutes=None, is_asynchronous=is_asynchronous)  # noqa: E731
    with pytest.raises(RetryError, match=r"preempted at step 3, saved as .*/b/step=3.ckpt; --resume goes on"):
        # In the first of the two batches of a step: the step is done to its end.
        fit(tmp_path / "first", make(), first, sends(signal.SIGTERM, 2), **options)
    assert steps(tmp_path / "b") == [3]
    fit(tmp_path / "rest", make(), rest, resume=last_checkpoint(tmp_path / "b"), **options)
    assert sorted(rest.by_step) == [3, 4, 5]
    assert all(same(state, whole.by_step[step]) for step, state in rest.by_step.items())


def test_the_step_before_a_stop_is_logged_and_no_other(tmp_path: Path, handlers: Any) -> None:
    model = NoisyModel()
    trainer = tiny_trainer(
        tmp_path, callbacks=[sends(signal.SIGTERM, 2), DurableCheckpoint(tmp_path / "b")], enable_checkpointing=True
    )
    with pytest.raises(RetryError):
        trainer.fit(model, StatefulData(batches(8)))
    assert [step for step, _ in scalars(trainer)["train/loss"]] == [0, 1, 2]


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_start"])
def test_sigterm_in_a_validation_stops_at_once(tmp_path: Path, handlers: Any, hook: str) -> None:
    seen = []

    class Count(L.Callback):
        def on_validation_batch_start(self, *args: Any) -> None:
            seen.append(args)

    data = StatefulData(batches(12), batches(5, seed=5))
    with pytest.raises(RetryError, match="preempted at step 4"):
        fit(
            tmp_path,
            DurableCheckpoint(tmp_path / "b"),
            Count(),
            sends(signal.SIGTERM, 4, hook),
            data=data,
            val_check_interval=4,
        )
    assert len(seen) == 1
    rest = States()
    fit(tmp_path / "rest", DurableCheckpoint(tmp_path / "b"), rest, resume=tmp_path / "b" / "step=4.ckpt")
    assert sorted(rest.by_step) == list(range(4, 12))


def test_sigusr1_saves_and_goes_on(tmp_path: Path, handlers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = DurableCheckpoint(tmp_path / "b", every_n_minutes=None)
    trainer = fit(tmp_path, checkpoint, sends(signal.SIGUSR1, 3), limit_val_batches=0)
    assert trainer.global_step == 12
    assert steps(tmp_path / "b") == [4, 12]
    assert f"checkpoint: SIGUSR1 at step 4: saving {tmp_path}/b/step=4.ckpt\n" in capsys.readouterr().err


def full(checkpoint: DurableCheckpoint, failing: Callable[[int], bool]) -> DurableCheckpoint:
    """On a disk that is full at some steps."""
    write = checkpoint._io._write

    def fail(state: dict[str, Any], path: Path, **options: Any) -> None:
        if failing(state["global_step"]):
            raise OSError(28, "No space left on device")
        write(state, path, **options)

    checkpoint._io._write = fail
    return checkpoint


@pytest.mark.parametrize("is_asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_asynchronous: bool
) -> None:
    checkpoint = DurableCheckpoint(tmp_path / "a", every_n_steps=2, is_asynchronous=is_asynchronous)
    full(checkpoint, lambda step: step in (4, 6, 8))
    trainer = fit(tmp_path, checkpoint, AwaitWriter(checkpoint), limit_val_batches=0)
    assert trainer.global_step == 12
    # What there was before is kept as long as there are not two newer ones.
    assert steps(tmp_path / "a") == [10, 12]
    lines = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(lines) == 3
    assert lines[0].startswith(f"checkpoint: warning: {tmp_path}/a/step=4.ckpt was not saved: No space left on device;")


def test_a_checkpoint_that_was_not_saved_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = full(DurableCheckpoint(tmp_path / "a"), lambda step: True)
    with pytest.raises(StorageError):
        fit(tmp_path, checkpoint, AwaitWriter(checkpoint), limit_val_batches=1, val_check_interval=2)
    err = capsys.readouterr().err
    assert "was not saved: No space left on device" in err
    assert "does not say what was measured" not in err


def test_a_full_disk_at_the_end_is_tried_once_more_and_then_told(tmp_path: Path, handlers: Any) -> None:
    tries = []
    checkpoint = full(DurableCheckpoint(tmp_path / "a"), lambda step: not tries.append(step))
    with pytest.raises(StorageError, match=r"a/step=12.ckpt cannot be saved: No space left on device; earlier"):
        fit(tmp_path, checkpoint, limit_val_batches=0)
    assert tries == [12, 12]
    checkpoint = full(DurableCheckpoint(tmp_path / "a"), lambda step: True)
    with pytest.raises(StorageError, match=r"a/step=3.ckpt cannot be saved"):
        fit(tmp_path, checkpoint, sends(signal.SIGTERM, 2), limit_val_batches=0)


def test_an_error_waits_for_the_writer(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise LookupError("oh")

    checkpoint = DurableCheckpoint(tmp_path / "a", every_n_steps=3)
    write = checkpoint._io._write
    checkpoint._io._write = lambda *args, **options: (time.sleep(0.2), write(*args, **options))
    with pytest.raises(LookupError):
        fit(tmp_path, checkpoint, Fails(), limit_val_batches=0)
    assert manifest_path(tmp_path / "a" / "step=3.ckpt").exists()


def test_resumed_in_place_it_does_not_save_the_same_step_again(tmp_path: Path) -> None:
    first = DurableCheckpoint(tmp_path / "a", every_n_steps=1, is_asynchronous=False)
    fit(tmp_path / "first", first, max_steps=4)
    (tmp_path / "a" / ".step=9.ckpt.partial-12345678").write_bytes(b"left by a kill")
    path = tmp_path / "a" / "step=4.ckpt"
    before = path.stat().st_mtime_ns
    fit(tmp_path / "second", DurableCheckpoint(tmp_path / "a"), max_steps=5, resume=path)
    assert path.stat().st_mtime_ns == before
    # What was resumed from counts as one of the two: step 3 has gone.
    assert steps(tmp_path / "a") == [4, 5]


def test_a_folder_of_another_run_is_left_as_it_is(tmp_path: Path) -> None:
    fit(tmp_path / "first", DurableCheckpoint(tmp_path / "a"), max_steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    message = rf"dirpath {tmp_path}/a has checkpoints of another run; accepted: a new folder, or one of them"
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "second", DurableCheckpoint(tmp_path / "a", every_n_steps=1), max_steps=8)
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    # By another name it is still the folder of the checkpoint that is gone on from.
    (tmp_path / "link").symlink_to(tmp_path / "a")
    fit(tmp_path / "third", DurableCheckpoint(tmp_path / "a"), max_steps=3, resume=tmp_path / "link" / "step=2.ckpt")
    assert steps(tmp_path / "a") == [2, 3]


def test_a_trial_run_saves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, DurableCheckpoint(tmp_path / "a"), fast_dev_run=True)
    assert not (tmp_path / "a").exists()


def test_an_io_that_was_given_is_used(tmp_path: Path) -> None:
    io = DurableCheckpointIO()
    checkpoint = DurableCheckpoint(tmp_path / "a", is_asynchronous=False)
    fit(tmp_path, checkpoint, plugins=[io], max_steps=1)
    assert checkpoint._io is io
    assert not io.is_asynchronous
    assert steps(tmp_path / "a") == [1]


def test_a_strategy_that_shards_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(UserError, match=r"trainer.strategy: FSDPStrategy saves in shards, DurableCheckpoint in one"):
        DurableCheckpoint().setup(trainer, tiny_model(), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps is 0; accepted: at least 1, or null"),
        ({"every_n_minutes": 0.0}, "every_n_minutes is 0.0; accepted: above 0, or null"),
        ({"keep_last": 1}, "keep_last is 1; accepted: at least 2"),
    ],
    ids=str,
)
def test_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        DurableCheckpoint(**options)
    assert str(error.value) == f"DurableCheckpoint: {message}"


def test_after_a_preemption_the_same_callback_trains_on(tmp_path: Path, handlers: Any) -> None:
    checkpoint = DurableCheckpoint(tmp_path / "b", every_n_minutes=None)
    with pytest.raises(RetryError, match="preempted at step 2"):
        fit(tmp_path, checkpoint, sends(signal.SIGTERM, 1), limit_val_batches=0, max_steps=4)
    trainer = fit(tmp_path, checkpoint, limit_val_batches=0, max_steps=4, resume=last_checkpoint(tmp_path / "b"))
    assert trainer.global_step == 4
    assert steps(tmp_path / "b") == [2, 4]


@pytest.mark.parametrize("hook", ["on_exception", "on_train_end"])
def test_lightning_handles_no_signal_after_the_training(tmp_path: Path, handlers: Any, hook: str) -> None:
    """Its handler broadcasts, to ranks that may have ended."""
    found = []

    class Late(DurableCheckpoint):
        pass

    def note(self: Any, *args: Any) -> None:
        getattr(DurableCheckpoint, hook)(self, *args)
        found.append(signal.getsignal(signal.SIGTERM))

    setattr(Late, hook, note)
    checkpoint = Late(tmp_path / "b", every_n_minutes=None)
    stop = [sends(signal.SIGTERM, 1)] if hook == "on_exception" else []
    with pytest.raises(RetryError) if stop else nullcontext():
        fit(tmp_path, checkpoint, *stop, limit_val_batches=0, max_steps=4)
    assert found == [checkpoint._signals._set]
