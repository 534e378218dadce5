"""The verbs of `muse` that take a recipe, and the run around a trainer's call."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from muse_lightning.checkpoints.choice import stored
from muse_lightning.checkpoints.durable_checkpoint import DurableCheckpoint
from muse_lightning.checkpoints.manifest import manifest_path
from muse_lightning.checkpoints.preemption import NOTHING_SAVED, preemption_as_retry, stoppable
from muse_lightning.configuration.taken_flags import take_flag
from muse_lightning.data.workers import DataWorkerError, death_of_worker
from muse_lightning.endings import as_ending, early_stop
from muse_lightning.errors import UserError, find_cause
from muse_lightning.measure.info import GIB, machine_report
from muse_lightning.numerics.replay import Replay
from muse_lightning.recipe_cli import ANY_SEQ_LEN, MuseCLI
from muse_lightning.training.checks import check_trainer
from muse_lightning.training.levers import Setting, longest_contexts
from muse_lightning.training.recipe_report import recipe_report
from muse_lightning.training.weights import check_weights


def run_trainer(verb: str, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """`muse fit | validate | test | predict`.

    Raises:
        UserError: what the configuration, the data or the checkpoint do not allow. A run that had not trained yet
            leaves no folder.
        RetryError: it was preempted, or its folder is in use.
        NumericsError: it had only steps that are not finite, or one that was not the same twice.
        StorageError: what must be kept cannot be written.
    """
    if verb == "fit":
        refusal = "a file must follow, such as runs/muse/version_0/numerics/step=7.replay.ckpt"
        files, args = take_flag("--replay", args, refusal)
        if files:
            replay(Path(files[-1]), description, args, allowed)
            return
    with stoppable(preempted(verb)):
        run_in_folder(verb, MuseCLI(verb, description, args, allowed, builds="trainer"))


def run_in_folder(verb: str, cli: MuseCLI) -> None:
    """Do what a command line says, in the folder that was made for it, and release that.

    Raises:
        UserError, RetryError, StorageError: as `run_trainer`.
    """
    with cli.run_folder as folder:
        try:
            # Here already, for what is to be done with the folder.
            with preemption_as_retry(preempted(verb)):
                _run(verb, cli)
            if cli.trainer.is_global_zero:
                stop = early_stop(cli.trainer)
                print(*([] if stop is None else [stop]), f"run: {folder.path}", sep="\n", file=sys.stderr)
        except Exception as error:
            ending = as_ending(error, cli.config, (lambda: training_setting(cli)) if verb == "fit" else None)
            if ending is None:
                if death_of_worker(error) is not None:
                    raise DataWorkerError from error
                raise
            if not cli.model.has_trained:
                folder.discard()
            if not isinstance(ending, UserError) and folder.is_inherited:
                # Lightning kills all ranks as soon as one that it has started ends with anything but 0.
                return
            raise ending from error
        except (KeyboardInterrupt, SystemExit) as stop:
            if find_cause(stop, KeyboardInterrupt):
                if not cli.model.has_trained:
                    folder.discard()
                elif cli.trainer.is_global_zero:
                    print(interrupted(cli.trainer.global_step, folder.checkpoints), file=sys.stderr)
            raise


def preempted(verb: str) -> str:
    """What SIGTERM has left of what no `DurableCheckpoint` saves, in one line."""
    if verb == "fit":
        return NOTHING_SAVED
    return f"preempted: muse {verb} is not complete, and its run folder is removed; start it again"


def interrupted(step: int, checkpoints: Path) -> str:
    """What Ctrl-C has left of a run, in one line.

    Args:
        step: optimizer steps done.
        checkpoints: the folder where they are saved.
    """
    saved = [path for _, path in stored(checkpoints) if manifest_path(path).exists()]
    rest = f"the last checkpoint is {saved[0]}; --resume goes on from there" if saved else "there is no checkpoint yet"
    return f"interrupted at step {step}, which is not saved; {rest}"


def replay(file: Path, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """`muse fit --replay FILE`.

    Raises:
        UserError: it is no such file, or what it tells of did not come again.
    """
    step = Replay(file)
    with step.settings_file() as settings:
        cli = MuseCLI("fit", description, [f"--config={settings}", *args], allowed, builds="model")
    trainer = cli.config.trainer
    precision = trainer.precision or "32-true"
    for line in step.run(
        cli.model, accelerator=trainer.accelerator, precision=precision, deterministic=trainer.deterministic
    ):
        print(line)


def _run(verb: str, cli: MuseCLI) -> None:
    options: dict[str, Any] = {"return_predictions": False} if verb == "predict" else {}
    # Before data is prepared, which may take hours.
    if verb == "fit":
        check_trainer(cli.trainer)
        cli.model.check_strategy(cli.trainer.strategy)
        for callback in cli.trainer.checkpoint_callbacks:
            if isinstance(callback, DurableCheckpoint):
                callback.check_strategy(cli.trainer.strategy)
    if cli.checkpoint is None and cli.model.weights is not None:
        check_weights(cli.model.llama, cli.model.weights)
    elif verb != "fit" and cli.checkpoint is None:
        said = f"muse {verb}: warning: fresh random weights; give --ckpt_path or --model.weights"
        print(said, file=sys.stderr)
    checkpoint = None if cli.checkpoint is None else str(cli.checkpoint)
    run = getattr(cli.trainer, verb)
    run(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True, **options)


def prepare(verb: str, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """`muse prepare`: build the dataset of a recipe, or find that it is there."""
    cli = MuseCLI(verb, description, args, allowed, builds="data")
    data = cli.datamodule
    data.prepare_data()
    data.check_files("fit")
    if data.sources is None:
        names = ", ".join(dataset.name for dataset in data.datasets)
        print(f"data: {names}: used as prepared, for data.sources is null", file=sys.stderr)
    if data.seq_len == ANY_SEQ_LEN:
        return
    try:
        data.check_blocks("fit", readers=1)
    except UserError as error:
        print(f"data: warning: as it is, muse fit would end with: {error}", file=sys.stderr)


def info(verb: str, description: str, args: Sequence[str], allowed: Sequence[str]) -> None:
    """`muse info`: this machine and, given a recipe, what training it here takes."""
    if not args:
        print(machine_report())
        return
    args = [f"{argument}=true" if argument == "--longest_context" else argument for argument in args]
    cli = MuseCLI(verb, description, args, allowed, builds="model")
    if cli.config.longest_context:
        print_longest_contexts(cli)
        return
    if cli.config.memory_gib is not None:
        raise UserError(f"--memory_gib={cli.config.memory_gib:g}: accepted beside --longest_context alone")
    print(machine_report())
    setting = training_setting(cli)
    print(
        recipe_report(
            setting.model,
            batch_size=setting.batch_size,
            seq_len=setting.seq_len,
            accumulate=setting.accumulate,
            precision=setting.precision,
            has_documents=cli.config.data.document_mask,
        )
    )


def print_longest_contexts(cli: MuseCLI) -> None:
    """`muse info --longest_context`.

    Raises:
        UserError: there is no GPU, and no --memory_gib either.
    """
    memory_gib = cli.config.memory_gib
    if memory_gib is None and not torch.cuda.is_available():
        raise UserError("--longest_context: no GPU here; --memory_gib=80 says how much one has")
    memory = torch.cuda.mem_get_info()[1] if memory_gib is None else int(memory_gib * GIB)
    print(f"longest context by prediction on a GPU of {memory / GIB:.3g} GiB, then with one lever more on each line:")
    limit, beyond = cli.config.model.config.max_position_embeddings, False
    for said, longest in longest_contexts(training_setting(cli), memory):
        print(f"{longest:>12,}  {said}" if longest else f"{'does not fit':>12}  {said}", flush=True)
        beyond |= (longest or 0) > limit
    if beyond:
        print(f"model.config.max_position_embeddings, now {limit:,}, must be as long")


def training_setting(cli: MuseCLI) -> Setting:
    """Model and batches of a command line."""
    data, trainer = cli.config.data, cli.config.trainer
    return Setting(cli.model, data.batch_size, data.seq_len, trainer.accumulate_grad_batches, trainer.precision)
