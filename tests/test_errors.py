"""A user's mistake ends as one true line with exit code 2, through the whole program, and leaves nothing behind."""

import errno
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from muse_lightning import cli
from muse_lightning.data.card import read_card
from muse_lightning.data.sources import Folders
from muse_lightning.data.tokenizer import load_tokenizer
from muse_lightning.data.tokenizer_training import train_tokenizer
from muse_lightning.errors import UserError, find_cause, is_storage_error, one_line, suggestion, too_long_path
from muse_lightning.training.run_folder import RunFolder
from tests.recipe import Muse


@pytest.mark.parametrize(
    ("name", "accepted", "expected"),
    [
        ("topk", ["top_k", "chunk", "order"], "; nearest: top_k"),
        ("zzz", ["top_k", "chunk", "order"], "; accepted: chunk, order, top_k"),
        ("zzz", [f"top_{i}" for i in range(13)], ""),
        ("top_3", [f"top_{i}" for i in range(13)], "; nearest: top_3, top_9, top_8"),
        ("zzz", [], ""),
    ],
    ids=["alike", "few", "many", "many alike", "none"],
)
def test_suggestion(name: str, accepted: list[str], expected: str) -> None:
    assert suggestion(name, accepted) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n  b", "a b"),
        ("a" * 1900, "a" * 1900),
        ("a" * 1200 + "b" * 25_000 + "c" * 700, "a" * 1200 + " ... " + "c" * 700),
        ("a" * 1190 + " https://u:hunter2" + "@h/a" + "b" * 1000, "a" * 1190 + " https://h" + " ... " + "b" * 700),
    ],
    ids=["lines", "longest", "longer", "credentials where it is cut"],
)
def test_one_line(text: str, expected: str) -> None:
    assert one_line(text) == expected


def test_a_line_full_of_urls_takes_no_time() -> None:
    started = time.process_time()
    assert len(one_line("http:/" * 20_000)) < 2000
    assert time.process_time() - started < 4  # 18 s if all of it were searched


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(OSError, match="too long") as found:
        os.stat("a" * 5000)
    caused = RuntimeError("of a library")
    caused.__cause__ = found.value
    for error in (found.value, caused):
        assert str(too_long_path(error)) == f"'{'a' * 299}: File name too long; give a shorter path"
    assert too_long_path(FileNotFoundError(errno.ENOENT, "No such file", "a" * 5000)) is None
    assert too_long_path(ValueError()) is None


class TestPaths:
    """Wherever a user names one, it may be none that the system takes."""

    LONG = "a" * 300 + "/b"

    @pytest.mark.parametrize(
        "args",
        [
            ("fit", "--replay={}"),
            ("fit", "--config=recipe.yaml", "--run.name={}"),
            ("fit", "--config=recipe.yaml", "--resume", "--run.root={}"),
            ("validate", "--config=recipe.yaml", "--ckpt_path={}"),
            ("prepare", "--config=recipe.yaml", "--data.dataset={}"),
            ("prepare", "--config=recipe.yaml", "--data.tokenizer={}"),
            ("data", "audit", "{}"),
            ("export", "{}", "--output=o"),
            ("import", "source", "--output={}"),
            ("reproduce", "{}"),
        ],
        ids=lambda args: " ".join(arg for arg in args if arg != "--config=recipe.yaml"),
    )
    def test_too_long(self, muse: Muse, args: tuple[str, ...]) -> None:
        line = muse.error(*(arg.format(self.LONG) for arg in args))
        assert "File name too long" in line or line.startswith("ckpt_path: no checkpoint at aaa")

    def test_a_run_that_has_begun_is_discarded(self, muse: Muse) -> None:
        assert "File name too long" in muse.error("fit", "--config=recipe.yaml", f"--model.weights={self.LONG}")

    @pytest.mark.parametrize("flag", ["--data.dataset={}", "--data.tokenizer={}", "--model.weights={}"])
    def test_home_of_no_user(self, muse: Muse, flag: str) -> None:
        line = muse.error("fit", "--config=recipe.yaml", flag.format("~no-such-user/a"))
        assert line == "~no-such-user/a: no user of this name has a home folder; give the whole path"

    def test_not_utf_8(self, muse: Muse) -> None:
        line = muse.error("fit", "--config=recipe.yaml", "--run.name=caf\udce9")
        assert line == r"'--run.name=caf\udce9' (command line): not UTF-8; give names and values in UTF-8"


class TestConfiguration:
    """Depth by depth; tests/configuration/ has every kind of mistake."""

    @pytest.mark.parametrize(
        ("yaml", "line"),
        [
            ("trianer: {max_steps: 1}", "trianer: not a known option; nearest: trainer (bad.yaml)"),
            (
                "trainer: {max_stepz: 1}",
                "trainer.max_stepz: not a parameter of Trainer; nearest: max_steps, max_time, min_steps (bad.yaml)",
            ),
            ("trainer: {max_steps: some}", "trainer.max_steps: expected an integer, found 'some' (bad.yaml)"),
            (
                "model: {config: {hidden_sise: 8}}",
                "model.config.hidden_sise: not a parameter of LlamaConfig; nearest: hidden_size (bad.yaml)",
            ),
            (
                "model: {config: {rope_scaling: {factr: 8}}}",
                "model.config.rope_scaling.factr: not a parameter of RopeScaling; nearest: factor (bad.yaml)",
            ),
            (
                "model: {attention: Muze}",
                "model.attention: 'Muze' is no known AttentionStrategy; nearest: Muse (bad.yaml)",
            ),
            (
                "model: {attention: {class_path: Muse, init_args: {topk: 3}}}",
                "model.attention.init_args.topk: not a parameter of Muse; nearest: top_k (bad.yaml)",
            ),
            (
                "data: {sources: [{class_path: Folders, init_args: {pth: x}}]}",
                "data.sources[0].init_args.pth: not a parameter of Folders; nearest: path (bad.yaml)",
            ),
            (
                "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: x}}]}",
                "trainer.callbacks[0].init_args.save_top_k: expected an integer, found 'x' (bad.yaml)",
            ),
            (
                "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: 3}}]}",
                "a class that the configuration names cannot be built: ModelCheckpoint(save_top_k=3, monitor=None) is "
                "not a valid configuration.",
            ),
            (
                "data: {filters: {max_fil_bytes: 3}}",
                "data.filters.max_fil_bytes: not a parameter of Filters; nearest: ",
            ),
            (
                "model: {config: {hidden_size: 10}}",
                "config.num_attention_heads is 4; it must divide config.hidden_size, 10",
            ),
            ("model: {betas: [0.9, 1.5]}", "model.betas is (0.9, 1.5); accepted: at least 0 and below 1, both"),
            ("data: {batch_size: 0}", "data.batch_size: 0 found, at least 1 expected"),
            ("trainer: {strategy: shraded}", "trainer.strategy: 'shraded' is no known strategy; nearest: sharded"),
            ("trainer: {accelerator: gpu, devices: 64}", "trainer: "),
            (
                "model: {attention: Dense}",
                "model.attention: Dense does not take chunk=16 and query_cluster=4 and key_cluster=4 and top_k=1 and "
                "exact_below=16, given to Muse (recipe.yaml); to drop it, write model.attention: {class_path: Dense, "
                "init_args: {}}",
            ),
        ],
    )
    def test_one_line(self, muse: Muse, yaml: str, line: str) -> None:
        Path("bad.yaml").write_text(yaml + "\n")
        assert muse.error("fit", "--config", "recipe.yaml", "--config", "bad.yaml").startswith(line)

    def test_every_verb_with_a_configuration_says_so(self, muse: Muse) -> None:
        for verb in ("validate", "test", "predict", "prepare", "info"):
            line = muse.error(verb, "--config", "recipe.yaml", "--modle.attention=Dense")
            assert line == "modle: not a known option; nearest: model (command line)"

    @pytest.mark.parametrize(
        ("args", "line"),
        [
            (["data", "inspect"], "required, but not given: dataset"),
            (["data", "inspect", "nowhere"], "nowhere"),
            (["data", "inspect", "dataset", "--blok=1"], "blok: not a known option; nearest: block"),
            (
                ["tokenizer", "train", "--sources=[Foldrs]"],
                "sources[0]: 'Foldrs' is no known DocumentSource; nearest: ",
            ),
            (["profile", "--steps=3"], "steps: not a known option; nearest: bench.steps (command line)"),
            (["fit", "--config"], "--config: a file or recipe:NAME must follow"),
            (["fit"], "required, but not given: model.config.vocab_size"),
        ],
    )
    def test_other_command_lines(self, muse: Muse, args: list[str], line: str) -> None:
        assert line in muse.error(*args)


class TestData:
    def fit(self, muse: Muse, *flags: str) -> str:
        return muse.error("fit", "--config", "recipe.yaml", *flags)

    def test_empty_source_folder(self, muse: Muse) -> None:
        Path("empty").mkdir()
        line = self.fit(muse, "--data.sources=[{class_path: Folders, init_args: {path: empty}}]")
        assert line == "source folder empty: no files found; give a folder whose sub-folders are repositories"

    def test_missing_source_folder(self, muse: Muse) -> None:
        line = self.fit(muse, "--data.sources=[{class_path: Folders, init_args: {path: nowhere}}]")
        assert line.startswith("source folder nowhere: No such file or directory")

    def test_unreadable_source_folder(self, muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
        """The system says no, as it does to everyone but root."""
        scandir = os.scandir

        def refuse(path: Any = ".") -> Any:
            if path == Path("source"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert self.fit(muse) == (
            "source folder source: Permission denied; give a folder whose sub-folders are repositories"
        )

    def test_nothing_left_after_filters(self, muse: Muse) -> None:
        line = self.fit(muse, "--data.filters.max_file_bytes=10", "--data.dataset=new/folder/dataset")
        assert line.startswith("nothing is left of 4 listed repositories after the filters and limits; files left out:")

    def test_tokenizer_larger_than_the_vocabulary(self, muse: Muse) -> None:
        assert self.fit(muse, "--model.config.vocab_size=100") == (
            "model.config.vocab_size is 100; the tokenizer has 259 ids, so at least 259 are needed"
        )

    def test_context_longer_than_the_model_takes(self, muse: Muse) -> None:
        assert self.fit(muse, "--data.seq_len=65").startswith(
            "data.seq_len is 65; model.config.max_position_embeddings"
        )

    def test_fewer_blocks_than_a_step_needs(self, muse: Muse) -> None:
        assert muse.with_recipe("prepare")[0] == 0
        line = self.fit(muse, "--data.batch_size=100000")
        assert "data.seq_len: 32 found; split 'train'" in line
        assert "no context is short enough" in line

    @pytest.mark.parametrize(
        ("prepared", "found"), [("one.json", "two.json"), ("one.json", "bytes"), ("bytes", "two.json")]
    )
    def test_dataset_of_another_tokenizer(self, muse: Muse, prepared: str, found: str) -> None:
        for name, size in [("one.json", 270), ("two.json", 280)]:
            train_tokenizer([Folders(Path("source"))], Path(name), vocab_size=size)
        assert muse.with_recipe("prepare", f"--data.tokenizer={prepared}")[0] == 0
        assert self.fit(muse, "--data.sources=null", f"--data.tokenizer={found}") == (
            f"data.tokenizer: {found} found, but dataset was prepared with {prepared}; configure that one, or "
            "prepare the data again (data.sources)"
        )

    def test_dataset_of_a_tokenizer_that_has_changed(self, muse: Muse) -> None:
        for size in (270, 280):
            Path("one.json").unlink(missing_ok=True)
            train_tokenizer([Folders(Path("source"))], Path("one.json"), vocab_size=size)
            if size == 270:
                assert muse.with_recipe("prepare", "--data.tokenizer=one.json")[0] == 0
        old = read_card(Path("dataset")).tokenizer["sha256"]
        new = load_tokenizer("one.json").sha256
        assert self.fit(muse, "--data.sources=null", "--data.tokenizer=one.json") == (
            f"data.tokenizer: one.json ({new[:12]}) found, but dataset was prepared with another file of that name "
            f"({old[:12]}); configure that one, or prepare the data again (data.sources)"
        )

    def test_dataset_of_other_special_tokens(self, muse: Muse) -> None:
        assert muse.with_recipe("prepare")[0] == 0
        line = self.fit(muse, "--data.sources=null", "--data.special_tokens.repo_name=<repo>")
        assert line == (
            "data.special_tokens: repo_name '<repo>' found, but dataset was prepared with repo_name '<|repo_name|>'; "
            "configure that one, or prepare the data again (data.sources)"
        )

    def test_missing_dataset(self, muse: Muse) -> None:
        assert "dataset" in self.fit(muse, "--data.sources=null")

    def test_all_exact_is_allowed_with_one_warning(self, muse: Muse) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            code, _, _ = muse.with_recipe("fit", "--model.attention.exact_below=32", "--trainer.max_steps=1")
        assert code == 0
        assert len([w for w in caught if "without documents exactly at this context" in str(w.message)]) == 1


class TestCredentials:
    """Whatever a message quotes, and wherever it comes from."""

    @pytest.mark.parametrize(
        ("args", "shown"),
        [
            (("fit", "--config=recipe.yaml", "--ckpt_path={0}/a?hunter2"), "ckpt_path: {0}/a?... is an address"),
            (("fit", "--config=recipe.yaml", "--model.weights={0}/a"), "model.weights: https:/h/a does not exist"),
            (("data", "inspect", "{0}/ds"), "dataset: {0}/ds is an address; expected a path on this machine"),
            (("data", "audit", "{0}/run"), "run: {0}/run is an address; expected a path on this machine"),
            (("data", "inspect", "dataset", "--histogram=s3://u:hunter2@b/a"), "histogram: s3://b/a is an address"),
        ],
    )
    def test_addresses_in_place_of_paths(self, muse: Muse, args: tuple[str, ...], shown: str) -> None:
        code, out, err = muse(*(arg.format("https://u:hunter2@h") for arg in args))
        assert code == 2
        assert "hunter2" not in out + err
        assert f"error: {shown.format('https://h')}" in err

    @pytest.mark.parametrize("traceback", ["", "1"])
    def test_tracebacks(self, muse: Muse, monkeypatch: pytest.MonkeyPatch, traceback: str) -> None:
        def overview() -> str:
            try:
                return dict[str, str]()["https://u:hunter2@h/a"]
            except KeyError as error:
                raise UserError("no such place: https://u:hunter2@h/a") from error

        monkeypatch.setenv("MUSE_TRACEBACK", traceback)
        monkeypatch.setattr(cli, "overview", overview)
        code, _, err = muse("--help")
        assert code == 2
        assert err.endswith("error: no such place: https://h/a\n")
        assert ("KeyError: 'https://h/a'" in err) == bool(traceback)

    def test_a_bug(self, muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli, "overview", lambda: dict[str, str]()["https://u:hunter2@h/a"])
        code, _, err = muse("--help")
        assert code == 1
        assert "KeyError: 'https://h/a'" in err


class TestCheckpoint:
    def error(self, muse: Muse, path: str, *flags: str) -> str:
        return muse.error("fit", "--config", "recipe.yaml", f"--ckpt_path={path}", *flags)

    def test_of_another_shape(self, muse: Muse) -> None:
        assert muse.with_recipe("fit")[0] == 0
        path = "runs/tiny/version_0/checkpoints/step=2.ckpt"
        line = self.error(muse, path, "--model.config.intermediate_size=64", "--trainer.max_steps=4")
        assert line.startswith(f"checkpoint {path} is of another shape: llama.model.layers.0.mlp.gate_proj.weight is ")

    def test_missing(self, muse: Muse) -> None:
        assert (
            self.error(muse, "no.ckpt")
            == "ckpt_path: no checkpoint at no.ckpt; expected the path of a local checkpoint, last, or best"
        )

    def test_a_run_folder(self, muse: Muse) -> None:
        assert muse.with_recipe("fit")[0] == 0
        line = self.error(muse, "runs/tiny/version_0")
        assert line.endswith("; nearest: runs/tiny/version_0/checkpoints/step=2.ckpt")

    def test_a_manifest(self, muse: Muse) -> None:
        assert muse.with_recipe("fit")[0] == 0
        path = "runs/tiny/version_0/checkpoints/step=2"
        assert self.error(muse, f"{path}.manifest.json") == (
            f"ckpt_path: {path}.manifest.json is the manifest of a checkpoint; expected the checkpoint, {path}.ckpt"
        )

    def test_not_a_checkpoint(self, muse: Muse) -> None:
        Path("text.ckpt").write_text("hello")
        line = self.error(muse, "text.ckpt")
        assert line == "ckpt_path: text.ckpt is not a Lightning checkpoint of tensors: not a whole file of torch.save"

    @pytest.mark.parametrize(
        ("content", "line"),
        [
            ({"weight": torch.ones(2)}, "is not a Lightning checkpoint of tensors: it has no state_dict"),
            ({"state_dict": {}}, "has no pytorch-lightning_version, optimizer_states, lr_schedulers; give it as"),
            (torch.ones(2), "is not a Lightning checkpoint of tensors: it has no state_dict"),
            ({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "has no optimizer_states, lr_schedulers; give"),
        ],
        ids=["other keys", "state dict alone", "tensor", "weights alone"],
    )
    def test_of_something_else(self, muse: Muse, content: Any, line: str) -> None:
        torch.save(content, "some.ckpt")
        assert self.error(muse, "some.ckpt").startswith(f"ckpt_path: some.ckpt {line}")

    def test_with_nothing_left_to_train(self, muse: Muse) -> None:
        assert muse.with_recipe("fit")[0] == 0
        path = "runs/tiny/version_0/checkpoints/step=2.ckpt"
        for steps in (1, 2):
            assert self.error(muse, path, f"--trainer.max_steps={steps}") == (
                f"trainer.max_steps: {steps} found, but ckpt_path {path} is of step 2: nothing is left to train; give "
                "more than 2"
            )
        assert muse.with_recipe("validate", f"--ckpt_path={path}")[0] == 0

    def test_cut_short(self, muse: Muse) -> None:
        assert muse.with_recipe("fit")[0] == 0
        content = Path("runs/tiny/version_0/checkpoints/step=2.ckpt").read_bytes()
        Path("cut.ckpt").write_bytes(content[: len(content) // 2])
        assert self.error(muse, "cut.ckpt").startswith("ckpt_path: cut.ckpt is not a Lightning checkpoint of tensors: ")

    def test_a_folder(self, muse: Muse) -> None:
        assert self.error(muse, "source").startswith("ckpt_path: source is a folder without meta.pt; expected")

    @pytest.mark.parametrize("error", [KeyError("oh"), EOFError("oh"), RuntimeError("PytorchStreamReader oh")])
    def test_is_not_blamed_for_what_happens_later(
        self, muse: Muse, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(*args: Any) -> None:
            raise error

        assert muse.with_recipe("fit")[0] == 0
        monkeypatch.setattr(Timer, "on_train_batch_end", fail)
        flags = ["--ckpt_path=runs/tiny/version_0/checkpoints/step=2.ckpt", "--trainer.max_steps=4"]
        code, _, err = muse.with_recipe("fit", *flags, "--trainer.callbacks+=Timer")
        assert code == 1
        assert f"{type(error).__name__}: {error}" in err.splitlines()

    @pytest.mark.parametrize("address", ["http://127.0.0.1:1/a.ckpt", "s3://bucket/a.ckpt", "file:///tmp/a.ckpt"])
    def test_an_address(self, muse: Muse, address: str) -> None:
        assert self.error(muse, address).startswith(f"ckpt_path: {address} is an address; expected")

    def test_that_runs_code_when_unpickled(self, muse: Muse) -> None:
        """First shown to work where weights_only is off."""
        torch.save({"state_dict": Touch("ran")}, "evil.ckpt")
        torch.load("evil.ckpt", weights_only=False)
        assert Path("ran").exists()
        Path("ran").unlink()
        assert self.error(muse, "evil.ckpt").startswith("ckpt_path: evil.ckpt is not a Lightning checkpoint")
        assert not Path("ran").exists()


class Touch:
    """Unpickles by creating a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


class TestTwoRunsInOneFolder:
    """The second ends, the first is left alone."""

    def test_while_the_first_is_running(self, muse: Muse) -> None:
        with RunFolder.create(Path("runs"), "tiny", 5):
            line = muse.error("fit", "--config", "recipe.yaml", "--run.version=5")
        assert line == (
            f"run.version: runs/tiny/version_5 is in use by process {os.getpid()} on {socket.gethostname()}; "
            "leave run.version out for a new one"
        )

    def test_after_the_first(self, muse: Muse) -> None:
        assert muse.with_recipe("fit", "--run.version=5")[0] == 0
        line = muse.error("fit", "--config", "recipe.yaml", "--run.version=5")
        assert line == "run.version: runs/tiny/version_5 exists already; leave run.version out for a new one"


@pytest.mark.timeout(10)
def test_an_error_that_its_own_effect_caused() -> None:
    """As a writer does that raises what its thread died of each time it is asked."""
    stored = OSError(errno.ENOSPC, "No space left on device")

    def raise_again() -> None:
        try:
            raise ValueError("cannot log") from stored
        except ValueError:
            raise stored  # noqa: B904  the circle

    with pytest.raises(OSError, match="No space left"):
        raise_again()
    assert stored.__context__ is not None
    assert stored.__context__.__cause__ is stored
    assert find_cause(stored, KeyError) is None
    assert is_storage_error(stored)
