"""Remote places, proved: tables of a bucket, clones over HTTP, and datasets that are streamed from where they were
uploaded. Everything is on this machine's loopback; the bucket is moto's S3."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from muse_lightning.data import TokenDataModule
from muse_lightning.data.card import DatasetCard, read_card
from muse_lightning.data.documents import DocumentSource
from muse_lightning.data.prepare import prepare_dataset
from muse_lightning.data.sources import Archives, Download, GitRepositories, Tables
from muse_lightning.data.tokenizer import ByteTokenizer
from muse_lightning.errors import UserError
from muse_lightning.files import sha256_file
from tests.data.memory_source import text
from tests.data.sources.builders import REPOSITORIES, contents, git, git_repository, json_lines, read_all, tar
from tests.data.sources.servers import file_server, git_server
from tests.data.sources.test_tables import parquet
from tests.data.test_prepare_stages import how

pytestmark = pytest.mark.multi_process

ROWS = [{"repo_name": f"owner/r{n}", "path": f"src/{n}.py", "text": text(n, 2500).decode()} for n in range(24)]


class Bucket:
    """A bucket of an S3 server."""

    def __init__(self, client, name: str) -> None:
        self._client = client
        self.name = name
        client.create_bucket(Bucket=name)

    def upload(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._client.upload_file(str(path), self.name, str(path.relative_to(folder)))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    # File systems are kept by their arguments, and the server's address is none of them.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return Bucket(boto3.client("s3", endpoint_url=s3), tmp_path.name.replace("_", "-").lower())


def tables(*files: str) -> Tables:
    return Tables(list(files), path="path")


def prepare(dataset: Path, source: DocumentSource) -> DatasetCard:
    return prepare_dataset(dataset, [source], ByteTokenizer(), "bytes", how(num_workers=2, fractions={}))


def batches(place: str, cache: Path, **arguments) -> list[str]:
    data = TokenDataModule(place, seq_len=300, batch_size=2, cache_dir=cache, **arguments)
    data.setup("fit")
    return [batch["record"] for batch in data.train_dataloader()]


def test_tables_of_a_bucket(bucket, tmp_path):
    """Lines, packed lines and Parquet, read by processes of their own, are what the same files give in a folder."""
    folder = tmp_path / "tables"
    json_lines(folder / "a-0.jsonl", ROWS[:8])
    json_lines(folder / "a-1.jsonl", ROWS[8:12])
    parquet(folder / "deeper" / "b.parquet", ROWS[12:])
    bucket.upload(folder)
    files = ["a-*.jsonl", "deeper/*.parquet"]
    card = prepare(tmp_path / "remote", tables(*(f"s3://{bucket.name}/{file}" for file in files)))
    here = prepare(tmp_path / "here", tables(*(f"{folder}/{file}" for file in files)))
    assert card.fingerprint == here.fingerprint
    assert card.sources[0]["documents"] == len(ROWS)
    assert card.sources[0]["units"] == 3
    # Used again, as long as nothing was uploaded anew.
    before = (tmp_path / "remote" / "dataset.json").stat().st_ino
    json_lines(folder / "a-1.jsonl", ROWS[8:11])
    for is_new in (False, True):
        if is_new:
            bucket.upload(folder)
        card = prepare(tmp_path / "remote", tables(*(f"s3://{bucket.name}/{file}" for file in files)))
        assert ((tmp_path / "remote" / "dataset.json").stat().st_ino != before) == is_new
    assert card.sources[0]["documents"] == len(ROWS) - 1


def test_what_a_bucket_refuses_is_one_line(bucket):
    for place, message in {
        f"s3://{bucket.name}/none.jsonl": "none.jsonl: ",
        f"s3://{bucket.name}/*.parquet": r"\*.parquet: no file found",
        "s3://no-such-bucket/a.jsonl": "no-such-bucket/a.jsonl: ",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            list(tables(place).units())
        assert "\n" not in str(error.value)


def test_an_object_that_is_gone_since_it_was_listed_is_named(bucket, tmp_path):
    folder = tmp_path / "tables"
    parquet(folder / "a.parquet", ROWS[:12])
    bucket.upload(folder)
    (unit,) = tables(f"s3://{bucket.name}/a.parquet").units()
    bucket._client.delete_object(Bucket=bucket.name, Key="a.parquet")
    with pytest.raises(ValueError, match=r"^is gone since it was listed$"):
        read_all(unit)


def test_downloads_from_a_bucket(bucket, tmp_path):
    archive = tar(tmp_path / "up" / "kit-1.0.tar.gz", [("kit/a.py", b"a = 1\n")])
    bucket.upload(tmp_path / "up")
    download = Download(f"s3://{bucket.name}/kit-1.0.tar.gz", sha256_file(archive))
    assert contents(Archives(downloads=[download], cache=tmp_path / "cache")) == {"kit": {"a.py": b"a = 1\n"}}


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dataset_in_a_bucket_is_streamed_through_a_small_cache(bucket, prepared, tmp_path, num_workers):
    bucket.upload(prepared)
    check_streaming(prepared, f"s3://{bucket.name}", tmp_path / "cache", num_workers)


def test_a_chunk_in_a_bucket_that_is_longer_than_its_card_says(bucket, prepared, tmp_path):
    name = read_card(prepared).splits["train"].chunks[0].filename
    upload = Path(shutil.copytree(prepared, tmp_path / "upload"))
    with (upload / "train" / name).open("ab") as file:
        file.write(b"more")
    bucket.upload(upload)
    with pytest.raises(UserError, match=rf"^s3://.*{name}: more than [\d,]+ bytes found"):
        batches(f"s3://{bucket.name}", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dataset_at_a_web_server_is_streamed_through_a_small_cache(prepared, tmp_path, num_workers):
    with file_server(prepared) as server:
        check_streaming(prepared, server.url, tmp_path / "cache", num_workers)


def check_streaming(dataset: Path, url: str, cache: Path, num_workers: int) -> None:
    chunks = read_card(dataset).splits["train"].chunks
    # One chunk for each process that reads, and one that is fetched beside it.
    limit = (num_workers or 1) * 2 * max(chunk.size_bytes for chunk in chunks)
    expected = batches(str(dataset), cache)
    assert not cache.exists()
    assert batches(url, cache, cache_bytes=limit, num_workers=num_workers) == expected
    kept = [path.stat().st_size for path in cache.glob("*.bin")]
    assert 0 < sum(kept) <= limit
    assert num_workers or len(kept) < len(chunks), "nothing had to make room"
    assert not [path for path in cache.iterdir() if path.suffix in (".partial", ".room")]


@pytest.mark.parametrize("kind", ["git's own server", "files of a web server"])
def test_a_repository_over_http(tmp_path, kind):
    repository = git_repository(tmp_path / "work", REPOSITORIES["alpha"])
    first = git(repository, "rev-parse", "HEAD")
    (repository / "src" / "a.py").write_bytes(b"a = 2\n")
    git(repository, "commit", "--quiet", "--all", "--message", "two")
    git(repository, "tag", "v2")
    served = tmp_path / "served"
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), str(served / "owner" / "alpha.git"))
    git(served / "owner" / "alpha.git", "update-server-info")
    is_smart = kind == "git's own server"
    with git_server(served) if is_smart else file_server(served) as server:
        url, cache = f"{server.url}/owner/alpha.git", tmp_path / "cache"
        wanted = {"": b"a = 2\n", "#v2": b"a = 2\n", f"#{first}": b"a = 1\n", "#main~1": b"a = 1\n"}
        for revision, content in wanted.items():
            found = contents(GitRepositories([url + revision], cache=cache))
            assert found["owner/alpha"] == {**REPOSITORIES["alpha"], "src/a.py": content}
        asked = len(server.paths)
        contents(GitRepositories([url], cache=cache))
        assert len(server.paths) == asked
        for place in (f"{server.url}/owner/none.git", f"{url}#none"):
            with pytest.raises(UserError, match=r"GitRepositories: http://127.0.0.1:\d+/owner/\w+\.git: ") as error:
                list(GitRepositories([place], cache=cache).units())
            assert "\n" not in str(error.value)
    # One commit where the server allows it.
    counts = sorted(int(git(path, "rev-list", "--count", "--all")) for path in (cache / "git").glob("*.git"))
    assert counts == ([1, 1, 1, 2] if is_smart else [2, 2, 2, 2])
    # What was fetched is read by processes of their own, and needs no server any more.
    card = prepare(tmp_path / "dataset", GitRepositories([url, f"{url}#main~1"], cache=cache))
    assert set(card.sources[0]["revisions"]["owner/alpha"].split()) == {first, git(repository, "rev-parse", "HEAD")}
