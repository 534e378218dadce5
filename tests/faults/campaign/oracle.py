"""The run that nothing disturbs, once for each setting: what every other run must be, bit for bit."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.campaign import locks
from tests.faults.campaign.digest import digest
from tests.faults.campaign.probe import Probe, attach
from tests.faults.campaign.processes import Start
from tests.faults.campaign.setting import MAX_STEPS, Setting, lay_out, prepare_command, run_of, write_sources

COMMAND = ("fit", "--config=recipe.yaml", "--resume")


@dataclass
class RankTrace:
    """What one rank did, by the number of the batch."""

    states: dict[int, dict[str, str]] = field(default_factory=dict)
    """Hashes before the update."""
    batches: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Hash of the tokens, and the loss with all its bits."""


@dataclass
class Oracle:
    """An uninterrupted run: a trace of each rank, the last checkpoint, and each step's figures as they were logged."""

    ranks: list[RankTrace]
    checkpoint: str
    logged: list[tuple[int, float]]


def prepare_datasets(folder: Path) -> None:
    """Make both datasets in a working directory."""
    write_sources(folder)
    for dataset in ("dataset", "other-dataset"):
        ended = Start(prepare_command(Path(dataset)), folder, 1, lambda rank: None, folder / "prepare.log").run()
        assert ended.codes == [0], ended.log


def make_oracle(folder: Path, prepared: Path, setting: Setting) -> Oracle:
    """Train without a fault and read what was noted."""
    lay_out(folder, prepared, setting)

    def inside(rank: int) -> None:
        enter(folder / "events", rank, [])

    ended = Start(COMMAND, folder, setting.ranks, inside, folder / "log").run()
    assert ended.codes == [0] * setting.ranks, ended.log
    traces = [trace(read_events(folder / "events", rank)) for rank in range(setting.ranks)]
    assert all(len(of_rank.batches) == setting.batches for of_rank in traces)
    return Oracle(traces, checkpoint_digest(folder), logged_losses(folder))


def enter(events: Path, rank: int, strikes: list[Any]) -> None:
    """What is done first in a process of a start."""
    from muse_lightning.checkpoints import lock

    lock.TIMEOUT_S = locks.TIMEOUT_S
    lock.HEARTBEAT_S = locks.TIMEOUT_S / 4
    attach(Probe(events.with_name(f"{events.name}.{rank}"), rank, strikes))


def read_events(events: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank noted; nothing if it came to nothing."""
    path = events.with_name(f"{events.name}.{rank}")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trace(events: list[dict[str, Any]]) -> RankTrace:
    """States and batches among what was noted."""
    found = RankTrace()
    for event in events:
        if event["event"] == "begin":
            found.states[event["batch"]] = event["state"]
        elif event["event"] == "end":
            found.batches[event["batch"]] = event["tokens"], event["loss"]
    return found


def checkpoint_digest(folder: Path) -> str:
    """Hash of the last checkpoint's weights, optimizer, schedule, position in the data, random states and hashes of all
    batches."""
    import torch

    path = run_of(folder) / "checkpoints" / f"step={MAX_STEPS}.ckpt"
    found = torch.load(path, weights_only=True)
    names = (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "TokenDataModule",
        "random_states",
        "global_step",
        "batch_hashes",
    )
    return digest({name: found.get(name) for name in names})


def logged_losses(folder: Path) -> list[tuple[int, float]]:
    """`train/loss` as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_of(folder))).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]
