"""What a command line with a recipe builds: LightningCLI(LanguageModel, TokenDataModule) and the folder of its run."""

import enum
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.fabric.utilities.seed import max_seed_value as MAX_SEED
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# A class is known by its bare name once it has been imported.
import muse_lightning.attention
import muse_lightning.data.sources  # noqa: F401
from muse_lightning.checkpoints.choice import report, step_of
from muse_lightning.checkpoints.manifest import identity_of
from muse_lightning.configuration.check import ConfigCheck, parse
from muse_lightning.configuration.differences import differences
from muse_lightning.configuration.layers import read_layers, use_loader
from muse_lightning.configuration.packaged import resolve_arguments
from muse_lightning.configuration.redact import arguments_without_credentials, without_credentials
from muse_lightning.data.datamodule import TokenDataModule
from muse_lightning.endings import refused_by_constructor
from muse_lightning.errors import (
    ExitCode,
    UserError,
    reason_of,
    shown_url,
    suggestion,
)
from muse_lightning.measure.info import run_environment
from muse_lightning.pretrained.run_folder import configuration_behind, run_configuration
from muse_lightning.run_defaults import run_callbacks, run_logger, run_plugins
from muse_lightning.training.module import LanguageModel
from muse_lightning.training.run_folder import RunFolder, find_checkpoint
from muse_lightning.training.sharded import ShardedStrategy  # noqa: F401  known by its name from here on
from muse_lightning.training.weights import check_checkpoint

# Some of Lightning's defaults are enumerations that are strings too, which PyYAML does not know how to write.
yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_str(member.name))
# A text such as 1e5, the name of a run perhaps, is a number to jsonargparse, which reads it again, but not to PyYAML.
yaml.SafeDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)

say = rank_zero_only(report)
"""Prints a line to standard error, on one rank."""

OF_THE_RUN = ("last", "best")
"""Checkpoints of run.name, for --ckpt_path."""
LINKS_AT_PARSE = {"model.seq_len": "data.seq_len", "data.seed": "seed_everything"}
LINKS_AT_INSTANTIATION = {"model.tokenizer_size": "data.vocab_size"}
LINKS = LINKS_AT_PARSE | LINKS_AT_INSTANTIATION
"""Target -> source: values that must agree are given once."""

ANY_MODEL = {
    "vocab_size": 2**31 - 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2**31 - 1,
}
"""Stands in for a model where data alone is prepared and the recipe has none: nothing is too large for it."""
ANY_SEQ_LEN = 1
"""Likewise for a context: `muse prepare` checks only one that the recipe names."""

EPILOG = """
--config takes a file or recipe:NAME (a packaged recipe) and may be repeated. Any key of a file is also a flag:
--model.attention=Muse --model.attention.top_k=8 --model.config=presets/75m.yaml --trainer.callbacks+=Name. What comes
later wins, file or flag; a flag before a file that sets the same otherwise is refused. A class path may name torch,
lightning, litdata and muse_lightning; --allow_module NAME (repeatable, as a flag only) trusts one more module, also one
in the working directory. muse fit --replay FILE (as a flag only) repeats the step that a run has ended at with exit
code 76, with the settings in the file; flags win. MUSE_TRACEBACK=1 shows the traceback of an error.
"""


class MuseCLI(LightningCLI):
    """Parser of one verb, and what is built from it: `model`, `datamodule` and `trainer`, those that the verb needs.

    Without LightningCLI's own subcommands (`run=False`) a config.yaml has the same keys for every verb, and what a
    checkpoint stored is never merged over files and flags.

    Args:
        verb: as the user wrote it.
        description: one line for its help.
        args: the command line after the verb, without --allow_module.
        allowed: modules of --allow_module.
        builds: what the verb needs: a "trainer" with a run folder, data module and model; the latter two, "data"; or
            the "model" alone.
        options: A dataclass of options that the verb has besides a recipe's, under the key `bench`.
        reproduces: the run that this one is to be equal to, for environment.json.
    """

    run_folder: RunFolder
    checkpoint: Path | None = None
    """What the run goes on from, or is evaluated."""

    def __init__(
        self,
        verb: str,
        description: str,
        args: Sequence[str],
        allowed: Sequence[str],
        builds: Literal["trainer", "data", "model"],
        options: type | None = None,
        reproduces: Path | None = None,
    ) -> None:
        self.verb = verb
        self.builds = builds
        self.allowed = allowed
        self.options = options
        self.given = list(args)
        self.reproduces = reproduces
        super().__init__(
            LanguageModel,
            TokenDataModule,
            save_config_callback=None,
            seed_everything_default=42,
            # The first training step comes sooner; the data module checks the validation data at set-up anyway. The
            # summary is a table of one row, with FLOPs of 0: `muse info` says more.
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            parser_kwargs={
                "prog": f"muse {verb}",
                "description": description,
                "epilog": EPILOG,
                "exit_on_error": False,
            },
            auto_configure_optimizers=False,
            # Alone, as other switches are written; jsonargparse wants a value.
            args=["--resume=true" if arg == "--resume" else arg for arg in resolve_arguments(args)],
            run=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed and the run's folder."""
        parser.add_argument(
            "--seed_everything", type=int, default=self.seed_everything_default, help="Seed of weights and data order."
        )
        parser.add_argument("--run.root", type=Path, default=Path("runs"), help="Folder of all runs.")
        parser.add_argument("--run.name", type=str, default="muse", help="The run is ROOT/NAME/version_N.")
        parser.add_argument(
            "--run.version", type=int | None, default=None, help="N, which must be new; null: the next free number."
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to start from: a path, or last or best of run.name. Its weights and training state are "
            "taken, never its configuration. Beside resume, a path: where a new run starts.",
        )
        parser.add_argument(
            "--resume",
            type=bool,
            default=False,
            help="Go on with the newest run of run.name, in its folder, from its last checkpoint that is whole; with "
            "a new one if there is none.",
        )
        parser.add_argument(
            "--verify_every",
            type=PositiveInt | None,
            default=None,
            help="Compute one optimizer step in so many twice, and compare the gradients bit for bit; null: as "
            "NumericsGuard says, which compares none.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Tie together values that must agree; the verb's own options."""
        if self.options is not None:
            parser.add_class_arguments(self.options, "bench")
        if self.verb == "info":
            parser.add_argument(
                "--longest_context", type=bool, default=False, help="Say how long a context fits, lever by lever."
            )
            parser.add_argument(
                "--memory_gib",
                type=PositiveFloat | None,
                default=None,
                help="Memory of that GPU; null: this machine's.",
            )
        for target, source in LINKS_AT_PARSE.items():
            parser.link_arguments(source, target)
        for target, source in LINKS_AT_INSTANTIATION.items():
            parser.link_arguments(source, target, apply_on="instantiate")
        if self.builds == "data":
            parser.set_defaults({f"model.config.{name}": value for name, value in ANY_MODEL.items()})
            parser.set_defaults({"data.seq_len": ANY_SEQ_LEN, "data.batch_size": 1})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse files and flags.

        Raises:
            UserError: any mistake in them, in one line.
        """
        use_loader()
        self.check = check = ConfigCheck(parser, LINKS, self.allowed)
        if not {"-h", "--help"} & set(args):
            _check_encoding(args)
            for layer in read_layers(args):
                check.add(layer)
        self.config = parse(parser, args, check)
        if not 0 <= self.config.seed_everything <= MAX_SEED:
            raise UserError(f"seed_everything: {self.config.seed_everything} found; accepted: 0 to {MAX_SEED}")
        if self.config.resume and self.verb != "fit":
            raise UserError(f"resume: true found; muse {self.verb} resumes nothing, muse fit does")
        if self.config.verify_every is not None and self.verb != "fit":
            raise UserError(
                f"verify_every: {self.config.verify_every} found; muse {self.verb} verifies no step, muse fit does"
            )
        chosen = self.config.ckpt_path
        if self.config.resume and chosen in OF_THE_RUN:
            raise UserError(
                f"resume: true found beside ckpt_path {chosen}; accepted beside it: a path, from which a new run starts"
            )
        # A run that is resumed needs it no more.
        if chosen is not None and not self.config.resume:
            self.checkpoint = self._chosen_checkpoint(chosen)

    def _chosen_checkpoint(self, chosen: str) -> Path:
        """What --ckpt_path means.

        Raises:
            UserError: it cannot be gone on from.
        """
        run = self.config.run
        path = str(find_checkpoint(run.root, run.name, chosen)) if chosen in OF_THE_RUN else chosen
        check_checkpoint(path, for_training=self.verb == "fit", max_steps=self.config.trainer.max_steps)
        return Path(path)

    def instantiate_classes(self) -> None:
        """Build what the verb needs."""
        try:
            if self.builds == "model":
                self.model = self.instantiate_model(self.config.model)
                return
            self.config_init = self.parser.instantiate(self.config, instantiators=self.check.instantiators())
        except Exception as error:
            mistake = refused_by_constructor(error)
            if mistake is None:
                raise
            raise mistake from error
        self.datamodule, self.model = self.config_init["data"], self.config_init["model"]
        if self.builds == "trainer":
            self.trainer = self.instantiate_trainer()

    def instantiate_model(self, config: Namespace) -> LanguageModel:
        """A model alone, from `model` of a configuration: it does not depend on data, which may not exist yet."""
        parser = ArgumentParser()
        parser.add_class_arguments(LanguageModel, "model")
        return parser.instantiate(Namespace(model=config), instantiators=self.check.instantiators()).model

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Create the run's folder, or go on in one, and a trainer that writes to it."""
        self.run_folder = self._open_run_folder()
        try:
            settings = self._config_text()
            self._report_differences(settings)
            self.run_folder.write(self.run_folder.record("config", "yaml"), settings)
            trainer = self.config_init["trainer"]
            _check_strategy(trainer["strategy"])
            return super().instantiate_trainer(
                logger=run_logger(trainer["logger"], self.run_folder),
                callbacks=run_callbacks(
                    self.verb,
                    trainer,
                    self.run_folder,
                    settings=settings,
                    environment=self.environment(),
                    verify_every=self.config.verify_every,
                ),
                plugins=run_plugins(trainer),
                default_root_dir=trainer["default_root_dir"] or self.run_folder.path,
                **kwargs,
            )
        except BaseException as error:
            with self.run_folder as folder:
                folder.discard()
            if isinstance(error, (MisconfigurationException, ValueError, TypeError)):
                raise UserError(f"trainer: {reason_of(error)}") from error
            raise

    def _open_run_folder(self) -> RunFolder:
        run = self.config.run
        if not self.config.resume:
            return RunFolder.create(run.root, run.name, run.version)
        resumed = RunFolder.resume(run.root, run.name, run.version)
        if resumed is None:
            if self.config.ckpt_path is not None:
                self.checkpoint = self._chosen_checkpoint(self.config.ckpt_path)
            start = "" if self.checkpoint is None else f" from {self.checkpoint}"
            say(f"resume: no run in {run.root / run.name} has a checkpoint that is whole; a new run starts{start}")
            return RunFolder.create(run.root, run.name, run.version)
        try:
            self._check_resumed(resumed)
        except BaseException:
            resumed.close()
            raise
        return resumed

    def _check_resumed(self, resumed: RunFolder) -> None:
        assert resumed.resumed is not None
        self.checkpoint = resumed.resumed
        self._check_start(resumed.path)
        step, max_steps = step_of(self.checkpoint), self.config.trainer.max_steps
        if 0 <= max_steps <= step:
            # Not a mistake: who starts the same command again until it succeeds has come to the end.
            say(f"resume: {resumed.path} is at step {step}, trainer.max_steps is {max_steps}: nothing is left to train")
            raise SystemExit(ExitCode.DONE)
        check_checkpoint(str(self.checkpoint), for_training=True, max_steps=max_steps)
        say(f"resume: from {self.checkpoint}")

    def _check_start(self, run: Path) -> None:
        """Refuse --ckpt_path where the run that goes on has not started from there."""
        given = self.config.ckpt_path
        if given is None:
            return
        then = run_configuration(run).get("ckpt_path")
        if then is None or Path(then).absolute() != Path(given).absolute():
            raise UserError(
                f"ckpt_path: {shown_url(given)} found beside resume, but {run}, which would go on, started from "
                f"{then or 'nothing'}; accepted: {then or 'no ckpt_path'}, or another run.name"
            )

    def _report_differences(self, settings: str) -> None:
        """Say what the recipe, whose text is `settings`, has otherwise than the run that it goes on from, where that
        has left its own."""
        if self.verb != "fit" or self.checkpoint is None:
            return
        try:
            before = configuration_behind(self.checkpoint)
        except UserError:
            return
        for line in differences(before, yaml.safe_load(settings), where=str(self.checkpoint)):
            say(line)

    def _config_text(self) -> str:
        """The whole configuration as YAML: running it again repeats the run, in a new version."""
        config = self.config.clone()
        config.pop("config", None)
        config.run.version = None
        config.resume = False
        if config.ckpt_path is not None:
            config.ckpt_path = str(self.checkpoint if config.ckpt_path in OF_THE_RUN else Path(config.ckpt_path))
        return without_credentials(self.parser.dump(config, skip_unset=False))

    def environment(self) -> dict[str, Any]:
        """What a run of this command line depends on beside its configuration, as plain data, without its data, which
        may not be there yet."""
        return run_environment() | {
            "command": ["muse", self.verb, *arguments_without_credentials(self.given)],
            "seed": self.config.seed_everything,
            "checkpoint": None if self.checkpoint is None else identity_of(self.checkpoint),
            "reproduces": None if self.reproduces is None else str(self.reproduces),
        }


def _check_encoding(args: Sequence[str]) -> None:
    """Refuse an argument that the run's config.yaml, which is UTF-8, could not say."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            raise UserError(f"{arg!r:.300} (command line): not UTF-8; give names and values in UTF-8") from None
        if "\0" in arg:  # of a caller in this process: a command line has none
            raise UserError(f"{arg!r:.300} (command line): has a null byte, which no path can have")


def _check_strategy(strategy: Any) -> None:
    """Lightning's own message names four strategies, and `sharded` is not among them."""
    names = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy.lower() not in names:
        raise UserError(f"trainer.strategy: {strategy!r} is no known strategy{suggestion(strategy, names)}")
