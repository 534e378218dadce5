"""Mistakes put into our own code, each of which must turn the campaign red: `python -m tests.faults.campaign.mutants`.

A campaign that stays green with one of them would not find it in the code either.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.campaign.campaign import Campaign
from tests.faults.campaign.setting import Setting

MOST_RUNS = 6
"""Until one is red."""


@dataclass(frozen=True)
class Mutant:
    """A mistake, and the faults that must bring it to light."""

    apply: Callable[[], None]
    kinds: Sequence[str]
    setting: Setting = Setting()  # noqa: RUF009  frozen


def random_state_not_restored() -> None:
    import muse_lightning.checkpoints.durable_checkpoint as module

    vars(module)["restore_random_state"] = lambda state: None


def data_position_off_by_one() -> None:
    from muse_lightning.data.streaming import TrainLoader

    load = TrainLoader.load_state_dict

    def wrong(self: TrainLoader, state: dict[str, Any]) -> None:
        load(self, state)
        self._position = next(iter(self.plan.epoch(self.plan.begin(self._position))))[1]

    vars_of(TrainLoader, load_state_dict=wrong)


def ledger_not_cut_back() -> None:
    import muse_lightning.callbacks.ledger as module

    kept = module.kept_lines
    vars(module)["kept_lines"] = lambda path, batches: kept(path, 1 << 60)


def schedule_not_restored() -> None:
    from torch.optim.lr_scheduler import LambdaLR

    vars_of(LambdaLR, load_state_dict=lambda self, state: None)


def optimizer_state_dropped() -> None:
    from muse_lightning.checkpoints.durable_io import DurableCheckpointIO

    load = DurableCheckpointIO.load_checkpoint

    def wrong(self: DurableCheckpointIO, *args: Any, **options: Any) -> dict[str, Any]:
        found = load(self, *args, **options)
        for state in found["optimizer_states"]:
            state["state"] = {}
        return found

    vars_of(DurableCheckpointIO, load_checkpoint=wrong)


def flags_not_reduced_over_ranks() -> None:
    from muse_lightning.checkpoints.preemption import Agreement
    from tests.faults.campaign import processes

    vars_of(Agreement, any=lambda self, *flags: list(flags))
    processes.LIMIT_S = 15.0


def saves_inside_the_handler() -> None:
    from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint
    from muse_lightning.errors import RetryError

    start = DurableCheckpoint.on_train_start

    def wrong(self: DurableCheckpoint, trainer: Any, module: Any) -> None:
        def handle(number: int, frame: Any) -> None:
            self._step = trainer.global_step
            self._save(trainer)
            self._io.wait()
            raise RetryError("preempted")

        vars(self._signals)["_set"] = handle
        start(self, trainer, module)

    vars_of(DurableCheckpoint, on_train_start=wrong)


def stops_between_micro_batches() -> None:
    from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint

    ends = DurableCheckpoint.on_train_batch_end

    def wrong(self: DurableCheckpoint, *args: Any, **options: Any) -> None:
        self._step = -1
        ends(self, *args, **options)

    vars_of(DurableCheckpoint, on_train_batch_end=wrong)


def lock_ignored() -> None:
    import muse_lightning.checkpoints.lock as module

    vars(module)["_wait_for"] = lambda descriptor, timeout_s: None
    vars(module)["_wait_for_silence"] = lambda descriptor, timeout_s: None


def checkpoint_hash_not_checked() -> None:
    import muse_lightning.checkpoints.choice as module

    vars(module)["problem_of"] = lambda path: None if path.exists() else "it is not there"


def manifest_hash_not_checked() -> None:
    import muse_lightning.checkpoints.manifest as module

    class Fits(str):
        __hash__ = str.__hash__

        def __ne__(self, other: object) -> bool:
            return False

    read, hash_of = module.Manifest.read.__func__, module._hash_of

    def wrong(cls: type, checkpoint: Any) -> Any:
        vars(module)["_hash_of"] = lambda fields: Fits()
        try:
            return read(cls, checkpoint)
        finally:
            vars(module)["_hash_of"] = hash_of

    vars_of(module.Manifest, read=classmethod(wrong))


def newest_by_time() -> None:
    import muse_lightning.checkpoints.choice as module

    stored = module.stored

    def wrong(folder: Any) -> Any:
        return sorted(stored(folder), key=lambda found: -found[1].stat().st_mtime if found[1].exists() else 0.0)

    vars(module)["stored"] = wrong


def chunk_hash_not_checked() -> None:
    import muse_lightning.data.block_reader as module

    vars(module)["check_content"] = lambda file, path, sha256: None


def workers_die_of_a_preemption() -> None:
    import muse_lightning.data.streaming as module

    vars(module)["outlive_preemption"] = lambda worker: None


def failed_save_ends_the_training() -> None:
    from muse_lightning.checkpoints.durable_io import DurableCheckpointIO

    def wrong(self: DurableCheckpointIO, *args: Any, **options: Any) -> None:
        self._write(*args, **options)

    vars_of(DurableCheckpointIO, _save=wrong)


def vars_of(owner: type, **attributes: Any) -> None:
    """Replace attributes of a class."""
    for name, value in attributes.items():
        setattr(owner, name, value)


_DAMAGED = ("checkpoint_bit", "checkpoint_zeros", "kill")
MUTANTS = {
    "random state not restored": Mutant(random_state_not_restored, ("kill",)),
    "data position off by one": Mutant(data_position_off_by_one, ("kill",)),
    "ledger not cut back": Mutant(ledger_not_cut_back, ("kill",)),
    "schedule not restored": Mutant(schedule_not_restored, ("kill",)),
    "optimizer state dropped": Mutant(optimizer_state_dropped, ("kill",)),
    "flags not reduced over ranks": Mutant(flags_not_reduced_over_ranks, ("term_rank_1",), Setting(ranks=2)),
    "SIGTERM saves inside the handler": Mutant(saves_inside_the_handler, ("term",), Setting(accumulate=2)),
    "a step's first micro-batch forgotten": Mutant(stops_between_micro_batches, ("term",), Setting(accumulate=2)),
    "lock ignored": Mutant(lock_ignored, ("lock_elsewhere", "kill")),
    "checkpoint's hash not checked": Mutant(checkpoint_hash_not_checked, _DAMAGED),
    "manifest's hash not checked": Mutant(manifest_hash_not_checked, ("manifest_bit", "kill")),
    "newest by time of the file": Mutant(newest_by_time, ("times_mixed", "kill")),
    "chunk's hash not checked": Mutant(chunk_hash_not_checked, ("chunk_bit", "chunk_zeros")),
    "workers die of a preemption": Mutant(workers_die_of_a_preemption, ("term_group",), Setting(workers=2)),
    "a failed save ends the training": Mutant(failed_save_ends_the_training, ("save_fails", "kill_in_validation")),
}


def main() -> int:
    """Run a campaign on each until it is red; exit code 1 if one stays green."""
    survivors = []
    print("| mutant | faults | red after | by |\n| --- | --- | --- | --- |")
    with Campaign(is_quiet=True, stops_at_problem=True) as campaign:
        for name, mutant in MUTANTS.items():
            campaign.kinds, campaign.setting, campaign.mutate = mutant.kinds, mutant.setting, mutant.apply
            began = time.monotonic()
            injections, line = 0, ""
            for seed in range(MOST_RUNS):
                records = campaign.run([seed])
                injections += sum(record.has_struck for record in records)
                line = next((record.problems[0] for record in records if record.problems), "")
                if line:
                    break
            if not line:
                survivors.append(name)
            said = f"{injections} injections, {time.monotonic() - began:.0f} s" if line else "stays green"
            print(f"| {name} | {', '.join(mutant.kinds)} | {said} | {line[:90]} |", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
