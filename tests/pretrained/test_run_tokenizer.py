"""The tokenizer of a run that was trained: what has changed on the disk since does not change ids unseen."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from muse_lightning.cli import main
from muse_lightning.data.tokenizer import Tokenizer, load_tokenizer
from muse_lightning.errors import UserError
from muse_lightning.pretrained.reference import open_model
from tests.pretrained.checkpoints import bpe_tokenizer
from tests.recipe import Muse

RUN = Path("runs/tiny/version_0")
SPECIAL = ("<|repo_name|>", "<|file_sep|>", "<|endoftext|>")


def change_ids(file: Path) -> None:
    """Exchange the ids of a and b."""
    described = json.loads(file.read_text())
    vocab = described["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(described))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it, its dataset, and tok.json, which both were made with."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Muse(folder, None)  # writes the recipe and repositories
        bpe_tokenizer(*SPECIAL).save("tok.json")
        assert main(["fit", "-c", "recipe.yaml", "--data.tokenizer=tok.json"]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def tokenizer_of_run() -> Tokenizer:
    tokenizer = open_model(RUN).load_tokenizer()
    assert tokenizer is not None
    return tokenizer


def unchanged(folder: Path) -> None:
    pass


def changed_file(folder: Path) -> None:
    change_ids(folder / "tok.json")


def no_file(folder: Path) -> None:
    (folder / "tok.json").unlink()


def no_copy(folder: Path) -> None:
    (folder / "dataset" / "tokenizer.json").unlink()


def damaged_ledger(folder: Path) -> None:
    (folder / RUN / "ledger" / "rank0.jsonl").write_text("{}\n")
    change_ids(folder / "tok.json")


@pytest.mark.parametrize("change", [unchanged, changed_file, no_file, no_copy, damaged_ledger])
def test_the_dataset_says_which(folder: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture) -> None:
    wanted = load_tokenizer("tok.json")
    change(folder)
    tokenizer = tokenizer_of_run()
    assert tokenizer.sha256 == wanted.sha256
    assert tokenizer.encode([b"ab"])[0].tolist() == wanted.encode([b"ab"])[0].tolist()
    assert capsys.readouterr().err == ""


def test_a_mixture_says_which(folder: Path) -> None:
    wanted = load_tokenizer("tok.json")
    changed_file(folder)
    stored = yaml.safe_load((RUN / "config.yaml").read_text())
    mixture = [{"dataset": "s3://bucket/other", "weight": 1.0}, {"dataset": "dataset", "weight": 1.0}]
    stored["data"] |= {"dataset": None, "mixture": mixture}
    (RUN / "config.yaml").write_text(yaml.safe_dump(stored))
    assert tokenizer_of_run().sha256 == wanted.sha256


def test_another_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Without the dataset's copy, and with one that changed as well."""
    wanted = load_tokenizer("tok.json").sha256[:12]
    changed_file(folder)
    found = load_tokenizer("tok.json").sha256[:12]
    for change in (lambda: change_ids(folder / "dataset" / "tokenizer.json"), lambda: no_copy(folder)):
        change()
        with pytest.raises(UserError) as error:
            tokenizer_of_run()
        assert str(error.value) == (
            f"{RUN}/config.yaml: data.tokenizer tok.json is {found} here, but dataset was prepared with {wanted}; "
            "expected that one, there or at dataset/tokenizer.json"
        )
    assert main(["export", str(RUN), "--output", "out"]) == 2
    assert main(["generate", "--model", str(RUN), "--prompt=a", "--device=cpu"]) == 2
    assert not Path("out").exists()


def without_dataset(folder: Path) -> None:
    shutil.rmtree(folder / "dataset")


def prepared_anew(folder: Path) -> None:
    """Under the same names, with a tokenizer that no run was trained with."""
    shutil.rmtree(folder / "dataset")
    change_ids(folder / "tok.json")
    assert main(["prepare", "-c", "recipe.yaml", "--data.tokenizer=tok.json"]) == 0


@pytest.mark.parametrize("change", [without_dataset, prepared_anew])
def test_what_was_not_checked_is_said(
    folder: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture
) -> None:
    change(folder)
    capsys.readouterr()
    tokenizer = tokenizer_of_run()
    assert tokenizer.sha256 == load_tokenizer("tok.json").sha256
    assert capsys.readouterr().err == (
        f"{RUN}/config.yaml: data.tokenizer tok.json: not checked, the dataset that the run began with is not on this "
        "machine\n"
    )
    capsys.readouterr()
    assert main(["import", str(RUN), "--output", "imported"]) == 0
    assert capsys.readouterr().err.count("not checked") == 1
    overlay = yaml.safe_load(Path("imported/recipe.yaml").read_text())["data"]
    assert overlay["special_tokens"] == asdict(tokenizer.special_tokens)
    again = load_tokenizer(overlay["tokenizer"])
    assert again.special_ids == tokenizer.special_ids
    assert list(again.token_texts) == list(tokenizer.token_texts)
