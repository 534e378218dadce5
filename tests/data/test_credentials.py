"""Users, passwords and signatures in URLs reach no message, no card and no name."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muse_lightning.data.card import read_card
from muse_lightning.data.datamodule import TokenDataModule
from muse_lightning.data.prepare import prepare_dataset
from muse_lightning.data.prepared import PreparedDataset
from muse_lightning.data.remote import ChunkCache, copy_tokenizer
from muse_lightning.data.sources import Archives, Download, GitRepositories, PyPIPackages, Tables
from muse_lightning.data.tokenizer import ByteTokenizer
from muse_lightning.errors import UserError, reason_of, shown_url
from muse_lightning.files import sha256_file
from tests.data.memory_source import text
from tests.data.sources.builders import LIMITS, json_lines, tar, write
from tests.data.sources.servers import FileServer, file_server
from tests.data.sources.test_tables import parquet
from tests.data.test_prepare_stages import how
from tests.data.test_tokenizer import byte_level, saved

SECRET = "hunter2"
ROWS = [{"repo_name": f"r{n}", "text": text(n, 300).decode()} for n in range(12)]


URLS = [
    ("https://user:hunter2@host/a.jsonl", "https://host/a.jsonl"),
    ("https://hunter2@host:80/o/n#v1", "https://host:80/o/n#v1"),
    ("https://user:p@hunter2?@host/a", "https://host/a"),
    ("https://host/a.jsonl?X-Amz-Signature=hunter2&b=hunter2", "https://host/a.jsonl?..."),
    ("https://host/a.jsonl?hunter2", "https://host/a.jsonl?..."),
    ("abfs://user:hunter2@store/a?sig=hunter2#b", "abfs://store/a?...#b"),
    ("simplecache::https://u:hunter2@h/a?k=hunter2", "simplecache::https://h/a?..."),
    (
        "GET 'https://u:hunter2@h/a?k=hunter2' and http://x/?k=hunter2, b",
        "GET 'https://h/a?...' and http://x/?... b",
    ),
    ("s3://bucket/part-?.parquet", "s3://bucket/part-?.parquet"),
    ("s3://bucket/a@b", "s3://bucket/a@b"),
    ("git@host:owner/name", "git@host:owner/name"),
    ("/data/a?b=c@d/*.jsonl", "/data/a?b=c@d/*.jsonl"),
    ("https:/u:hunter2@host/a?hunter2", "https:/host/a?..."),
    ("https://host/a?...&sig=hunter2", "https://host/a?..."),
    ("ftp://hunter2@host/a", "ftp://host/a"),
    ("ssh://git@host/o/n", "ssh://host/o/n"),
    ("HTTPS://hunter2@host/a?hunter2", "HTTPS://host/a?..."),
    ("https://host/a?sig=a'hunter2&b", "https://host/a?..."),
    ("s3://user:p@hunter2@bucket/a", "s3://bucket/a"),
    ("abfs://one@account.dfs.core.windows.net/a", "abfs://one@account.dfs.core.windows.net/a"),
    ("hf://gpt2@main/a", "hf://gpt2@main/a"),
    ("file:///d/what?/year=2024/a.parquet", "file:///d/what?/year=2024/a.parquet"),
    ("file:///d/a?year=2024.parquet", "file:///d/a?year=2024.parquet"),
    ("s3://b/part-?/year=2024/a.parquet", "s3://b/part-?/year=2024/a.parquet"),
]


@pytest.mark.parametrize(("url", "shown"), URLS)
def test_what_is_shown(url, shown):
    assert shown_url(url) == shown
    message = f"{shown}: cannot be read ({shown})"
    assert shown_url(message) == message


def test_a_place_alone_is_no_reason():
    """What file systems say of a file that cannot be reached."""
    error = FileNotFoundError("http://u:hunter2@h/a?b=hunter2")
    assert reason_of(error) == "no such file"
    assert reason_of(FileNotFoundError("bucket/a")) == "no such file"
    assert reason_of(PermissionError("s3://bucket/a")) == "PermissionError"
    error.__cause__ = TimeoutError("no answer from http://u:hunter2@h")
    assert reason_of(error) == "no answer from http://h"


def test_reasons_are_one_short_line():
    assert reason_of(OSError(28, "No space left on device", "/a")) == "No space left on device"
    assert reason_of(ValueError("no http://u:hunter2@h/a?b=hunter2")) == "no http://h/a?..."
    assert reason_of(TimeoutError()) == "TimeoutError"
    assert reason_of(ValueError("one\n two")) == "one two"
    assert len(reason_of(ValueError("x" * 5000))) == 300


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    json_lines(tmp_path / "a.jsonl", [*ROWS[:6], {**ROWS[0], "repo_name": "copy"}])
    parquet(tmp_path / "b.parquet", ROWS[6:])
    write(tmp_path / "c.parquet", b"no parquet")
    with file_server(tmp_path) as server:
        yield server


def secret(server: FileServer, name: str) -> str:
    return f"{server.url.replace('//', f'//user:{SECRET}@')}/{name}?X-Amz-Signature={SECRET}"


def test_a_preparation_from_signed_urls(server, tmp_path, capfd):
    source = Tables([secret(server, name) for name in ("a.jsonl", "b.parquet", "c.parquet")])
    prepare_dataset(tmp_path / "dataset", [source], ByteTokenizer(), "bytes", how())
    card = read_card(tmp_path / "dataset")
    assert card.sources[0]["documents"] == 12
    assert list(card.sources[0]["damaged"]) == [f"{server.url}/c.parquet?..."]
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    unpacked = {path: gzip.decompress(content) for path, content in files.items() if path.suffix == ".gz"}
    assert b"duplicate" in unpacked[tmp_path / "dataset" / "left_out.jsonl.gz"]
    assert not [path for path, content in {**files, **unpacked}.items() if SECRET.encode() in content]
    out, err = capfd.readouterr()
    assert "left out, damaged: http" in err
    assert SECRET not in out + err
    # They were sent, though.
    assert f"/b.parquet?X-Amz-Signature={SECRET}" in server.paths


def test_a_table_signed_anew_is_the_same_and_a_changed_one_is_not(server, tmp_path):
    def found(signature: str) -> list[tuple[str, str]]:
        return [(u.name, u.stamp) for u in Tables([f"{server.url}/a.jsonl?Signature={signature}"]).units()]

    before = found("one")
    assert found("two") == before
    json_lines(tmp_path / "a.jsonl", [*ROWS[1:6], ROWS[0]])
    assert found("two") != before


def test_urls_that_cannot_be_told_apart_are_one_line(server):
    with pytest.raises(UserError, match=r"/a\.jsonl\?\.\.\. stands for several URLs"):
        list(Tables([f"{server.url}/a.jsonl?id=1", f"{server.url}/a.jsonl?id=2"]).units())


def test_downloads(server, tmp_path):
    digest = sha256_file(tar(tmp_path / "kit-1.0.tar.gz", [("kit/a.py", b"x = 1\n")]))
    source = Archives(downloads=[Download(secret(server, "kit-1.0.tar.gz"), digest)], cache=tmp_path / "cache")
    (unit,) = source.units()
    assert SECRET not in json.dumps(source.identity()) + repr(unit)
    assert source.identity()["downloads"][0]["url"] == f"{server.url}/kit-1.0.tar.gz?..."


def _reading(server: FileServer, cache: Path, name: str, breaks_off_after: int) -> None:
    (unit,) = Tables([secret(server, name)]).units()
    server.breaks_off_after = breaks_off_after
    list(unit.read(LIMITS))


def _download(server: FileServer, cache: Path, name: str, sha256: str) -> None:
    list(Archives(downloads=[Download(secret(server, name), sha256)], cache=cache).units())


MISTAKES: dict[str, Callable[[FileServer, Path], object]] = {
    "no table": lambda server, cache: list(Tables([secret(server, "none.jsonl")]).units()),
    "ending": lambda server, cache: list(Tables([secret(server, "a.csv")]).units()),
    "column": lambda server, cache: list(Tables([secret(server, "a.jsonl")], text="txt").units()),
    "lines that break off": lambda server, cache: _reading(server, cache, "a.jsonl", 10),
    "Parquet that breaks off": lambda server, cache: _reading(server, cache, "b.parquet", 0),
    "no digest": lambda server, cache: Download(secret(server, "a"), ""),
    "other digest": lambda server, cache: _download(server, cache, "a.jsonl", "0" * 64),
    "no download": lambda server, cache: _download(server, cache, "none", "0" * 64),
    "git": lambda server, cache: list(GitRepositories([secret(server, "o/n").split("?")[0]], cache=cache).units()),
    "git with a query": lambda server, cache: list(GitRepositories([secret(server, "o/n")], cache=cache).units()),
    "index": lambda server, cache: list(
        PyPIPackages(["kit==1.0"], index_url=secret(server, "simple"), cache=cache).units()
    ),
    "tokenizer": lambda server, cache: copy_tokenizer(secret(server, "tokenizer"), cache),
    "dataset": lambda server, cache: PreparedDataset.open(
        secret(server, "none"), "data.dataset", 1.0, ChunkCache(cache, 1000)
    ),
    "scheme": lambda server, cache: copy_tokenizer(f"nothing://user:{SECRET}@host/tokenizer.json", cache),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(server, tmp_path, mistake):
    with pytest.raises(UserError) as error:
        MISTAKES[mistake](server, tmp_path / "cache")
    message = str(error.value)
    assert SECRET not in message
    assert "\n" not in message


def test_no_object_shows_them(server, tmp_path):
    (unit,) = Tables([secret(server, "a.jsonl")]).units()
    assert SECRET not in repr(unit) + repr(Download(secret(server, "a.jsonl"), "0" * 64))


def test_a_tokenizer_is_named_without_them(prepared, tmp_path):
    saved(byte_level([]), tmp_path)
    with file_server(tmp_path) as server:
        url = f"{server.url.replace('//', f'//user:{SECRET}@')}/tokenizer.json"
        data = TokenDataModule(str(prepared), tokenizer=url, seq_len=8, batch_size=1, cache_dir=tmp_path / "cache")
        assert data.tokenizer_name == f"{server.url}/tokenizer.json"


def test_a_prepared_dataset_is_named_without_them(prepared, tmp_path):
    with file_server(prepared) as server:
        url = server.url.replace("//", f"//user:{SECRET}@")
        dataset = PreparedDataset.open(url, "data.dataset", 1.0, ChunkCache(tmp_path / "cache", 10**6))
        assert dataset.name == dataset.part(64).name == server.url
        assert SECRET not in repr(dataset)
        assert dataset.split("train").chunks.fetch(dataset.card.splits["train"].chunks[0]).exists()
