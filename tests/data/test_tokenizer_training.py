"""Training a byte-level BPE."""

import json

import pytest

from muse_lightning.data import tokenizer_training
from muse_lightning.data.filters import Filters
from muse_lightning.data.sources import Folders
from muse_lightning.data.tokenizer import load_tokenizer
from muse_lightning.data.tokenizer_training import train_tokenizer
from muse_lightning.errors import UserError
from tests.data.sources.builders import write


def test_trains_a_tokenizer_that_loads_and_compresses(repositories, tmp_path, capsys):
    train_tokenizer([Folders(repositories)], tmp_path / "out", vocab_size=300)
    assert "out/tokenizer.json: 300 tokens, from" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.vocab_size == 300
    assert sorted(tokenizer.special_ids.values()) == [0, 1, 2]
    text = next(repositories.rglob("*.py")).read_bytes()
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids).encode() == text
    assert len(ids) < 0.6 * len(text)


def test_equal_input_gives_an_equal_file_and_limits_choose_by_seed(repositories, tmp_path):
    def train(name: str, **arguments) -> bytes:
        train_tokenizer([Folders(repositories)], tmp_path / f"{name}.json", vocab_size=300, **arguments)
        return (tmp_path / f"{name}.json").read_bytes()

    assert train("a") == train("b") == train("c", seed=1)
    assert len({train(f"d{seed}", max_documents=1, seed=seed) for seed in range(3)}) > 1


def test_what_the_licences_leave_out_is_not_learned(tmp_path):
    for name, licence in [("free", "MIT"), ("copyleft", "GPL-3.0-only"), ("silent", "")]:
        write(tmp_path / name / "a.py", f"{name}_word = 1\n".encode() * 50)
        if licence:
            # In the order of paths behind the file it is about.
            write(tmp_path / name / "package.json", f'{{"license": "{licence}"}}'.encode())

    def vocabulary(**filters) -> set[str]:
        output = tmp_path / "tokenizer.json"
        output.unlink(missing_ok=True)
        train_tokenizer([Folders(tmp_path, suffixes=(".py",))], output, 400, filters=Filters(**filters))
        return set(json.loads(output.read_text())["model"]["vocab"])

    words = {"free", "copyleft", "silent"}
    assert words <= vocabulary()
    assert vocabulary(licences=["permissive"]) & words == {"free"}
    assert vocabulary(licences=["permissive"], keep_unlicensed=True) & words == {"free", "silent"}


def test_a_full_temporary_folder_is_one_line(tmp_path, longest_file, monkeypatch):
    """Where files wait for a licence that may come after them."""
    for number in range(20):
        write(tmp_path / "in" / f"{number}.py", f"x{number} = 1\n".encode() * 100)
    write(tmp_path / "in" / "package.json", b'{"license": "MIT"}')
    monkeypatch.setattr(tokenizer_training, "_MOST_IN_MEMORY", 1000)
    filters = Filters(licences=["permissive"])
    train_tokenizer([Folders(tmp_path)], tmp_path / "t.json", 300, filters=filters)
    longest_file(5000)
    with pytest.raises(UserError, match=r"^TMPDIR: no room in /.* \(File too large\); .* another folder$") as error:
        train_tokenizer([Folders(tmp_path)], tmp_path / "u.json", 300, filters=filters)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "u.json").exists()


def test_fewer_merges_than_asked_for_are_told(repositories, tmp_path, capsys):
    train_tokenizer([Folders(repositories)], tmp_path / "first", vocab_size=20_000)
    found = load_tokenizer(str(tmp_path / "first")).vocab_size
    assert f"vocab_size: 20,000 asked for, but the text has pairs for {found:,} only; " in capsys.readouterr().err
    train_tokenizer([Folders(repositories)], tmp_path / "second", vocab_size=found)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"\0", {}, r"no file of 1 listed units passes the filters"),
        (b"x = 1\n", {"vocab_size": 258}, r"vocab_size: 258 found, at least 259 expected"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, content, arguments, message):
    (tmp_path / "r" / "a").mkdir(parents=True)
    (tmp_path / "r" / "a" / "f.py").write_bytes(content)
    with pytest.raises(UserError, match=message):
        train_tokenizer([Folders(tmp_path / "r")], tmp_path / "new" / "folder", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("output", ["t.json", "folder"])
def test_a_tokenizer_that_is_there_is_not_replaced(tmp_path, output):
    path = tmp_path / output if output.endswith(".json") else tmp_path / output / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"^output: .*json exists already"):
        train_tokenizer([Folders(tmp_path)], tmp_path / output)
    assert path.read_text() == "mine"


def test_sources_that_are_missing_leave_no_folder(tmp_path):
    with pytest.raises(UserError):
        train_tokenizer([Folders(tmp_path / "none")], tmp_path / "new")
    assert not (tmp_path / "new").exists()
