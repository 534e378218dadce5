"""`muse` as a user meets it: verbs, precedence of files and flags, run folder, exit codes."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from muse_lightning import __version__
from muse_lightning.cli import VERBS
from muse_lightning.configuration.packaged import recipes_folder
from muse_lightning.data.card import read_card
from muse_lightning.recipe_cli import MuseCLI
from muse_lightning.training.module import LanguageModel
from tests.recipe import Muse, start


def build(*args: str) -> MuseCLI:
    """What a verb without a trainer builds from `recipe.yaml` and these flags."""
    return MuseCLI("info", "", ["--config", "recipe.yaml", *args], [], builds="data")


class TestWithoutTorch:
    @pytest.mark.parametrize("args", [["--help"], [], ["--version"], ["fti"]])
    def test_neither_torch_nor_lightning_is_imported(self, args: list[str]) -> None:
        program = (
            "import sys; from muse_lightning.cli import main\n"
            f"main({args!r}); print(sorted({{'torch', 'lightning', 'jsonargparse'}} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_help_comes_at_once(self) -> None:
        """In 2 s, as a user waits: with the interpreter's own start, the quickest of three."""
        command = [sys.executable, "-m", "muse_lightning.cli", "--help"]
        seconds = []
        for _ in range(3):
            begin = time.monotonic()
            subprocess.run(command, capture_output=True, timeout=20, check=True)
            seconds.append(time.monotonic() - begin)
        assert min(seconds) < 2

    def test_help_lists_every_verb(self, muse: Muse) -> None:
        code, out, _ = muse("--help")
        assert code == 0
        assert len(VERBS) == 19
        for name, verb in VERBS.items():
            assert f"  {name} " in out
            assert verb.description in out

    def test_version(self, muse: Muse) -> None:
        assert muse("--version")[:2] == (0, f"muse-lightning {__version__}\n")

    @pytest.mark.parametrize(
        ("args", "line"),
        [
            (["fti"], "muse: no verb 'fti'; nearest: fit; muse --help lists all"),
            (["frobnicate"], "muse: no verb 'frobnicate'; muse --help lists all"),
            (["data"], "muse data: a second word must follow; accepted: data inspect"),
            (["tokenizer", "tran"], "muse tokenizer: a second word must follow; accepted: tokenizer train"),
            (["--config", "recipe.yaml"], "muse: no verb '--config'"),
        ],
    )
    def test_unknown_verb(self, muse: Muse, args: list[str], line: str) -> None:
        assert muse.error(*args).startswith(line)


@pytest.mark.parametrize(
    ("verb", "keys"),
    [
        (
            "fit",
            ["--config", "--run.name", "--model.attention", "--data.seq_len", "--trainer.max_steps", "--allow_module"],
        ),
        ("validate", ["--ckpt_path"]),
        ("test", ["--ckpt_path"]),
        ("predict", ["--ckpt_path", "--data.predict_split"]),
        ("prepare", ["--data.sources", "--print_config", "Larger files are left out"]),
        ("info", ["--config"]),
        ("data inspect", ["dataset", "--block"]),
        ("tokenizer train", ["--sources", "--vocab_size"]),
        ("bench attention", ["--lengths", "--muse.top_k", "--peers", "--check_only"]),
    ],
)
def test_help_of_a_verb(muse: Muse, verb: str, keys: list[str]) -> None:
    code, out, _ = muse(*verb.split(), "--help")
    assert code == 0
    assert out.startswith(f"usage: muse {verb} ")
    assert VERBS[verb].description in out
    assert [key for key in keys if key not in out] == []


@pytest.mark.parametrize(
    ("args", "is_shown"),
    [
        (["fit", "--help"], True),
        (["prepare", "-h"], True),
        (["fit", "--data.sources.help=Folders"], True),
        (["bench", "attention", "--help"], True),
        (["fit", "--config=recipe.yaml", "--print_config"], False),
        (["fit", "--config=recipe.yaml", "--trainer.max_steps=1"], False),
    ],
)
def test_what_fields_mean_is_read_for_help_alone(
    muse: Muse, monkeypatch: pytest.MonkeyPatch, args: list[str], is_shown: bool
) -> None:
    """Reading it takes longer than the rest of the command line."""
    read: list[object] = []
    parse = docstring_parser.parse_from_object
    monkeypatch.setattr(docstring_parser, "parse_from_object", lambda *a, **k: read.append(a) or parse(*a, **k))
    assert muse(*args)[0] == 0
    assert bool(read) == is_shown


class TestPrecedence:
    def test_later_files_and_flags_win(self, muse: Muse) -> None:
        Path("other.yaml").write_text("model: {learning_rate: 0.5, weight_decay: 0.25}\n")
        cli = build("--config=other.yaml", "--model.weight_decay=0.125")
        assert (cli.model.learning_rate, cli.model.weight_decay) == (0.5, 0.125)
        cli = build("--model.momentum=0.125", "--config=other.yaml")
        assert (cli.model.momentum, cli.model.weight_decay) == (0.125, 0.25)

    @pytest.mark.parametrize(
        "verb", ["fit", "validate", "test", "predict", "prepare", "bench training", "profile", "info"]
    )
    def test_a_flag_before_a_file_that_sets_the_same_is_refused(self, muse: Muse, verb: str) -> None:
        line = "--trainer.max_steps=1 stands before --config recipe.yaml, which sets it to 2; put it behind"
        assert muse.error(*verb.split(), "--trainer.max_steps=1", "--config=recipe.yaml") == line

    def test_also_of_a_verb_without_a_recipe(self, muse: Muse) -> None:
        Path("bench.yaml").write_text("seq_len: 8\n")
        line = "--seq_len=1 stands before --config bench.yaml, which sets it to 8; put it behind"
        assert muse.error("bench", "data", "--seq_len=1", "--config=bench.yaml") == line

    def test_attention_by_name_and_argument(self, muse: Muse) -> None:
        cli = build("--model.attention=Muse", "--model.attention.top_k=8")
        attention = cli.model.llama.blocks[1].self_attn.attention
        assert (type(attention).__name__, attention.options["top_k"]) == ("Muse", 8)

    def test_preset_with_a_field_of_ones_own(self, muse: Muse) -> None:
        flags = ["--model.config=presets/30m.yaml", "--model.config.num_hidden_layers=3"]
        config = build(*flags).model.config
        assert (config.num_hidden_layers, config.hidden_size) == (3, 384)
        Path("other.yaml").write_text("model: {config: presets/30m.yaml}\n")
        assert build("--config=other.yaml").model.config.hidden_size == 384

    def test_a_file_of_ones_own_named_like_a_preset_comes_first(self, muse: Muse) -> None:
        Path("presets").mkdir()
        Path("presets/30m.yaml").write_text("hidden_size: 24\n")
        assert build("--model.config=presets/30m.yaml").model.config.hidden_size == 24

    def test_callbacks_are_appended(self, muse: Muse) -> None:
        flags = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", "--trainer.callbacks+=Timer"]
        callbacks = build(*flags).config_init["trainer"]["callbacks"]
        assert [type(callback).__name__ for callback in callbacks] == ["EarlyStopping", "Timer"]
        assert callbacks[0].monitor == "x"

    def test_values_that_must_agree_are_given_once(self, muse: Muse) -> None:
        cli = build("--data.seq_len=48", "--seed_everything=7")
        assert cli.model.seq_len == cli.datamodule.seq_len == 48
        assert cli.model.tokenizer_size == cli.datamodule.vocab_size == 259
        assert cli.datamodule.seed == 7

    def test_packaged_recipes(self, muse: Muse) -> None:
        names = [path.stem for path in recipes_folder().glob("*.yaml")]
        assert len(names) == 15
        for name in names:
            code, out, err = muse("info", "--config", f"recipe:{name}", "--print_config")
            assert code == 0, err
            assert yaml.safe_load(out)["run"]["name"] == name.removesuffix("-muse").removesuffix("-dense")
        assert muse.error("fit", "--config=recipe:nothing").startswith(
            "--config: no packaged recipe is called 'nothing'"
        )


class TestRunFolder:
    def test_a_run_leaves_what_repeats_it(self, muse: Muse) -> None:
        code, out, err = muse.with_recipe("fit", "--model.learning_rate=0.01", "--trainer.callbacks+=Timer")
        assert code == 0, err
        run = Path("runs/tiny/version_0")
        environment = json.loads((run / "environment.json").read_text())
        assert environment["packages"]["torch"] == torch.__version__
        saved = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert saved == ["step=2.ckpt", "step=2.manifest.json"]
        events = EventAccumulator(str(run)).Reload()
        assert {"train/loss", "lr-AdamW/pg1"} <= set(events.Tags()["scalars"])
        assert "step 2/2" in out

        written = yaml.safe_load((run / "config.yaml").read_text())
        assert written["model"]["learning_rate"] == 0.01
        printed = muse("fit", "--config", str(run / "config.yaml"), "--print_config")[1]
        assert yaml.safe_load(printed) == written

    def test_a_fit_ends_with_a_checkpoint(self, muse: Muse) -> None:
        """Also where no validation came with the last step; and it can be resumed."""
        assert muse.with_recipe("fit", "--trainer.max_steps=3", "--trainer.val_check_interval=2")[0] == 0
        saved = sorted(Path("runs/tiny/version_0/checkpoints").glob("*.ckpt"))
        assert [path.name for path in saved] == ["step=2.ckpt", "step=3.ckpt"]
        code, out, err = muse.with_recipe("fit", "--trainer.max_steps=4", "--ckpt_path", str(saved[-1]))
        assert code == 0, err
        assert next(line for line in out.splitlines() if line.startswith("step")).startswith("step 4/4")

    def test_nothing_is_saved_where_checkpointing_is_off(self, muse: Muse) -> None:
        assert muse.with_recipe("fit", "--trainer.enable_checkpointing=false")[0] == 0
        assert not Path("runs/tiny/version_0/checkpoints").exists()

    @pytest.mark.parametrize("verb", ["validate", "predict"])
    def test_an_evaluation_of_random_weights_says_so(self, muse: Muse, verb: str) -> None:
        code, _, err = muse.with_recipe(verb)
        assert code == 0
        assert f"muse {verb}: warning: fresh random weights; give --ckpt_path or --model.weights" in err

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ("nowhere", "model.weights: nowhere does not exist"),
            ("other.safetensors", "other.safetensors has no tensor model.embed_tokens.weight"),
        ],
    )
    def test_weights_are_refused_before_data_is_prepared(self, muse: Muse, weights: str, message: str) -> None:
        save_file({"other": torch.zeros(1)}, muse.folder / "other.safetensors")
        assert message in muse.error("fit", "--config", "recipe.yaml", f"--model.weights={weights}")
        assert not Path("dataset").exists()

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["max_steps=0"], "trainer.max_steps is 0; the schedule needs"),
            (["max_steps=-1"], "trainer.max_steps is -1; the schedule needs"),
            (["max_steps=-2"], "trainer: `max_steps` must be a non-negative integer or -1"),
            (["limit_train_batches=0"], "trainer.limit_train_batches: 0 found, nothing would be trained; accepted:"),
            (["limit_train_batches=0.0"], "trainer.limit_train_batches: 0 found, nothing would be trained; accepted:"),
            (["val_check_interval=0"], "trainer.val_check_interval: 0 found; accepted: a number of batches"),
            (["check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch: 0 found; accepted: a number, at least 1"),
            (["max_time=00:00:00:00"], "trainer.max_time, or Timer's duration: 0 seconds found, no time to train;"),
            (["accumulate_grad_batches=0"], "trainer.accumulate_grad_batches: 0 found; accepted: a number, at least 1"),
            (["accumulate_grad_batches=-1"], "trainer.accumulate_grad_batches: -1 found; accepted: a number, at least"),
            (
                ["val_check_interval=3", "limit_train_batches=2"],
                "trainer.val_check_interval: 3 found, an epoch has 2 batches; give at most that",
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, list) else "",
    )
    def test_steps_are_refused_before_data_is_prepared(self, muse: Muse, flags: list[str], message: str) -> None:
        given = [f"--trainer.{flag}" for flag in flags]
        assert muse.error("fit", "--config", "recipe.yaml", *given).startswith(message)
        assert not Path("dataset").exists()

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (
                ["--model.optimizer=muon", "--trainer.strategy=sharded"],
                "model.optimizer is muon, which needs whole matrices; trainer.strategy ShardedStrategy may shard them",
            ),
            (
                [
                    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
                    "--trainer.strategy.save_distributed_checkpoint=true",
                ],
                "trainer.strategy: ModelParallelStrategy saves in shards, DurableCheckpoint in one file",
            ),
        ],
    )
    def test_strategies_are_refused_before_data_is_prepared(self, muse: Muse, flags: list[str], message: str) -> None:
        assert muse.error("fit", "--config", "recipe.yaml", *flags).startswith(message)
        assert not Path("dataset").exists()

    def test_a_resume_that_is_refused_leaves_no_run(self, muse: Muse) -> None:
        assert muse.with_recipe("fit")[0] == 0
        (muse.folder / "source" / "one" / "module_0.py").write_text("other = 1\n" * 200)
        muse.with_recipe("prepare")
        checkpoint = "--ckpt_path=runs/tiny/version_0/checkpoints/step=2.ckpt"
        assert "fingerprint" in muse.error("fit", "--config", "recipe.yaml", checkpoint, "--trainer.max_steps=4")

    @pytest.mark.parametrize("verb", ["fit", "validate"])
    def test_the_run_is_named_at_the_end(self, muse: Muse, verb: str) -> None:
        assert muse.with_recipe(verb)[2].splitlines()[-1] == "run: runs/tiny/version_0"

    def test_a_second_run_gets_the_next_version(self, muse: Muse) -> None:
        for _ in range(2):
            assert muse.with_recipe("fit", "--trainer.max_steps=1")[0] == 0
        assert muse.versions() == ["runs/tiny/version_0", "runs/tiny/version_1"]

    def test_other_verbs(self, muse: Muse) -> None:
        assert muse.with_recipe("prepare")[0] == 0
        assert Path("dataset/dataset.json").is_file()
        assert muse.with_recipe("fit")[0] == 0
        checkpoint = "--ckpt_path=runs/tiny/version_0/checkpoints/step=2.ckpt"
        for verb, figure in [("validate", "val/loss"), ("test", "test/bpb"), ("predict", "")]:
            code, out, err = muse.with_recipe(verb, checkpoint)
            assert code == 0, err
            assert figure in out
        first = load_file("runs/tiny/version_3/predictions/batch=000000_rank=0.safetensors")
        assert first["log_likelihood"].shape == first["labels"].shape == (2, 32)
        assert (first["log_likelihood"][first["labels"] >= 0] < 0).all()
        code, out, _ = muse("data", "inspect", "dataset", "--block=0", "--seq_len=32")
        assert code == 0
        assert "<|repo_name|>" in out

    def test_no_credentials_are_kept(self, muse: Muse) -> None:
        flags = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs"]
        flags += ["--trainer.logger.comment=s3://me:hunter2@host"]
        code, _, err = muse.with_recipe("fit", *flags)
        assert code == 0, err
        assert "hunter2" not in Path("runs/tiny/version_0/config.yaml").read_text()

    def test_files_and_flags_win_over_the_checkpoint(self, muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
        assert muse.with_recipe("fit", "--model.learning_rate=0.01", "--model.weight_decay=0.5")[0] == 0
        rates = []
        step = LanguageModel.training_step

        def training_step(model: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
            rates.append((model.trainer.global_step, model.learning_rate, model.weight_decay))
            return step(model, batch, batch_idx)

        monkeypatch.setattr(LanguageModel, "training_step", training_step)
        flags = ["--model.learning_rate=0.02", "--trainer.max_steps=3"]
        assert muse.with_recipe("fit", *flags, "--ckpt_path=runs/tiny/version_0/checkpoints/step=2.ckpt")[0] == 0
        assert rates == [(2, 0.02, 0.1)]


def test_a_handler_that_python_does_not_know_stays() -> None:
    """faulthandler's, in a program that calls a command: SIGUSR1 by default would kill it."""
    program = (
        "import faulthandler, signal; from muse_lightning.cli import main; faulthandler.register(signal.SIGUSR1)\n"
        "main(['--version']); signal.raise_signal(signal.SIGUSR1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0
    assert "most recent call first" in done.stderr


class TestExitCodes:
    @pytest.fixture
    def step_raises(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """Make the first training step end with an error."""

        def arrange(error: BaseException) -> None:
            def training_step(model: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
                raise error

            monkeypatch.setattr(LanguageModel, "training_step", training_step)

        handler = signal.getsignal(signal.SIGINT)
        yield arrange
        signal.signal(signal.SIGINT, handler)  # Lightning ignores SIGINT while it shuts down.

    def test_a_bug_of_ours(self, muse: Muse, step_raises: Any) -> None:
        step_raises(ZeroDivisionError("oh"))
        code, _, err = muse.with_recipe("fit")
        assert code == 1
        assert "Traceback" in err
        assert "ZeroDivisionError: oh" in err

    def test_ctrl_c(self, muse: Muse, step_raises: Any) -> None:
        step_raises(KeyboardInterrupt())
        code, _, err = muse.with_recipe("fit")
        assert code == 130
        assert "interrupted" not in err
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        ("flags", "rest"),
        [
            ([], "there is no checkpoint yet"),
            (
                ["--trainer.callbacks+=DurableCheckpoint", "--trainer.callbacks.every_n_steps=1"],
                "the last checkpoint is runs/tiny/version_0/checkpoints/step=1.ckpt; --resume goes on from there",
            ),
        ],
        ids=["nothing saved", "saved"],
    )
    def test_ctrl_c_says_what_is_left(self, muse: Muse, step_raises: Any, flags: list[str], rest: str) -> None:
        step = LanguageModel.training_step

        def second_step_raises(model: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                raise KeyboardInterrupt
            return step(model, batch, batch_idx)

        step_raises(KeyboardInterrupt())
        LanguageModel.training_step = second_step_raises
        code, _, err = muse.with_recipe("fit", *flags)
        assert code == 130
        assert err.splitlines()[-1] == f"interrupted at step 1, which is not saved; {rest}"

    def test_traceback_on_request(self, muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MUSE_TRACEBACK", "1")
        code, _, err = muse.with_recipe("fit", "--model.betas=1")
        assert code == 2
        assert "Traceback" in err
        assert err.splitlines()[-1] == "error: model.betas: expected [a number, a number], found 1 (command line)"

    def test_another_rank_says_which(self, muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert muse("fti")[2].startswith("rank 3: error: muse: no verb")

    def test_as_a_process(self, muse: Muse) -> None:
        command = [
            sys.executable,
            "-m",
            "muse_lightning.cli",
            "fit",
            "--config=recipe.yaml",
            "--model.attention.topk=3",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        line = "model.attention.init_args.topk: not a parameter of Muse; nearest: top_k (command line)"
        assert done.stderr == f"error: {line}\n"
        assert done.stdout == ""
        assert muse.versions() == []


@pytest.mark.multi_process
@pytest.mark.slow
class TestRanks:
    """Two processes, of which Lightning starts the second."""

    @staticmethod
    def fit(*flags: str) -> tuple[int | None, str]:
        """Exit code, and what both wrote."""
        log = Path("log")
        first = start(["fit", "--config=recipe.yaml", "--trainer.devices=2", "--trainer.strategy=ddp", *flags], log)
        first.join(240)
        return first.exitcode, log.read_text()

    def test_share_one_folder(self, muse: Muse) -> None:
        code, out = self.fit()
        assert code == 0, out
        assert muse.versions() == ["runs/tiny/version_0"]
        assert Path("runs/tiny/version_0/checkpoints/step=2.ckpt").is_file()

    def test_a_mistake_of_the_first_is_known_to_both(self, muse: Muse) -> None:
        """Only one rank prepares the data; the other must not be left at a barrier."""
        code, out = self.fit("--data.dataset=new", "--data.filters.max_file_bytes=1")
        assert code == 2, out
        assert "Traceback" not in out
        assert len([line for line in out.splitlines() if "error: " in line]) == 2

    def test_more_than_blocks(self, muse: Muse) -> None:
        """One block of training data, for two ranks."""
        flags = ["--data.val_fraction=0", "--data.test_fraction=0", "--data.max_documents=1", "--data.batch_size=1"]
        assert muse.with_recipe("prepare", *flags)[0] == 0
        (chunk,) = read_card(Path("dataset")).splits["train"].chunks
        seq_len, largest = chunk.tokens - 1, chunk.tokens // 2 - 1
        sizes = [f"--data.seq_len={seq_len}", f"--model.config.max_position_embeddings={seq_len}"]
        code, out = self.fit(*flags, *sizes)
        assert code == 2, out
        line = (
            f"error: data.seq_len: {seq_len} found; split 'train' ({chunk.tokens:,} tokens) has 1 blocks of that "
            f"length, 2 are needed for 2 rank(s) of batch_size 1; the largest that works is {largest}"
        )
        assert sorted(text for text in out.splitlines() if "rror" in text) == [line, f"rank 1: {line}"]
        assert muse.versions() == []
