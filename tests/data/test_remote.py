"""Datasets at URLs: the same batches as from the folder, a cache within its bounds, damage named."""

import contextlib
import http.server
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from muse_lightning.data import TokenDataModule, block_reader, remote
from muse_lightning.data.card import ChunkEntry, read_card
from muse_lightning.data.remote import CachedChunks, ChunkCache, copy_description, copy_file, copy_tokenizer
from muse_lightning.errors import UserError
from muse_lightning.files import sha256_bytes

SEQ_LEN = 300


def records(data: TokenDataModule) -> list[str]:
    return [batch["record"] for batch in data.train_dataloader()]


def module(place: Path | str, cache: Path, **arguments) -> TokenDataModule:
    data = TokenDataModule(str(place), seq_len=SEQ_LEN, batch_size=2, cache_dir=cache, **arguments)
    data.setup("fit")
    return data


def cached(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.bin"))


@pytest.fixture
def upload(prepared, tmp_path) -> Path:
    """A copy of the dataset that tests may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "upload"))


def test_batches_are_those_of_the_folder(upload, tmp_path):
    expected = records(module(upload, tmp_path / "unused"))
    assert not (tmp_path / "unused").exists()
    assert records(module(f"file://{upload}", tmp_path / "cache")) == expected
    chunks = read_card(upload).splits["train"].chunks
    assert {path.stem for path in cached(tmp_path / "cache")} == {chunk.sha256 for chunk in chunks}


def test_a_cached_dataset_is_not_fetched_again_wherever_it_moved(upload, tmp_path):
    expected = records(module(f"file://{upload}", tmp_path / "cache"))
    moved = upload.rename(tmp_path / "moved")
    for path in (moved / "train").glob("*.bin"):
        path.unlink()
    assert records(module(f"file://{moved}", tmp_path / "cache")) == expected


def size_of(path: Path) -> int:
    """0 for a file that another thread has just renamed or removed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_the_cache_stays_within_its_bounds(upload, tmp_path, monkeypatch):
    chunks = read_card(upload).splits["train"].chunks
    largest = max(chunk.size_bytes for chunk in chunks)
    limit = 2 * largest
    assert sum(chunk.size_bytes for chunk in chunks) > limit
    cache, sizes = tmp_path / "cache", []

    def copy_and_measure(url: str, target: Path, limit: int) -> None:
        copy_file(url, target, limit)
        sizes.append(sum(size_of(path) for path in cache.iterdir() if path.suffix in (".bin", ".partial")))

    monkeypatch.setattr("muse_lightning.data.remote.copy_file", copy_and_measure)
    data = module(f"file://{upload}", cache, cache_bytes=limit)
    train, expected = data.train_dataloader(), module(upload, cache).train_dataloader()
    for _ in range(2):
        assert [batch["record"] for batch in train] == [batch["record"] for batch in expected]
    assert largest < max(sizes) <= limit
    assert len(sizes) > len(chunks), "nothing was fetched twice: nothing had been evicted"


def chunk_files(folder: Path, count: int) -> list[ChunkEntry]:
    folder.mkdir()
    entries = []
    for number in range(count):
        content = bytes([number]) * 1000
        (folder / f"{number}.bin").write_bytes(content)
        entries.append(ChunkEntry(f"{number}.bin", sha256_bytes(content), 1000, 1, 1))
    return entries


def test_downloads_at_the_same_time_wait_for_room(tmp_path, monkeypatch):
    entries, sizes = chunk_files(tmp_path / "upload", 4), []
    cache = ChunkCache(tmp_path / "cache", 1500)
    cache.folder.mkdir()

    def copy_slowly(url: str, target: Path, limit: int) -> None:
        with target.open("wb") as file:  # in pieces, as over a network
            for _ in range(4):
                file.write(bytes(250))
                file.flush()
                time.sleep(0.03)
        copy_file(url, target, limit)
        sizes.append(sum(size_of(path) for path in cache.folder.iterdir() if path.suffix in (".bin", ".partial")))

    monkeypatch.setattr("muse_lightning.data.remote.copy_file", copy_slowly)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda entry: cache.fetch(f"file://{tmp_path}/upload/{entry.filename}", entry), entries))
    assert len(sizes) == 4
    assert max(sizes) <= 1500


def test_what_a_killed_download_left_makes_room(tmp_path):
    (entry,) = chunk_files(tmp_path / "upload", 1)
    cache = ChunkCache(tmp_path / "cache", 1500)
    cache.folder.mkdir()
    left = cache.folder / f"{'0' * 64}.partial"
    left.write_bytes(bytes(1000))
    left.with_suffix(".room").write_bytes(bytes(1000))
    cache.fetch(f"file://{tmp_path}/upload/{entry.filename}", entry)
    assert not left.exists()


def test_a_file_that_is_removed_while_it_is_open_stays_readable(upload, tmp_path, monkeypatch):
    """Any time after it was opened, another process may need its room."""
    entry = read_card(upload).splits["train"].chunks[0]
    chunks = CachedChunks(f"file://{upload}/train", ChunkCache(tmp_path / "cache", 10**6))
    expected = chunks.open(entry, "uint16").tokens.tolist()
    check = block_reader.check_content

    def check_and_remove(file, path, sha256) -> None:
        check(file, path, sha256)
        path.unlink()

    monkeypatch.setattr(block_reader, "check_content", check_and_remove)
    assert chunks.open(entry, "uint16").tokens.tolist() == expected
    assert not cached(tmp_path / "cache")


def test_the_next_chunk_waits_where_there_is_no_room_for_two(upload, tmp_path):
    chunks = read_card(upload).splits["train"].chunks
    data = module(f"file://{upload}", tmp_path / "cache", cache_bytes=max(chunk.size_bytes for chunk in chunks))
    iterator = iter(data.train_dataloader())
    next(iterator)
    time.sleep(0.3)
    assert len(cached(tmp_path / "cache")) == 1


def test_what_was_asked_for_longest_ago_makes_room(upload, tmp_path):
    entries = read_card(upload).splits["train"].chunks[:3]
    size = max(entry.size_bytes for entry in entries)
    cache = ChunkCache(tmp_path / "cache", 2 * size + 10)
    paths = []
    for number in (0, 1, 0, 2):
        paths.append(cache.fetch(f"file://{upload}/train/{entries[number].filename}", entries[number]))
        time.sleep(0.02)  # times of files are coarse
    assert [path.exists() for path in paths] == [True, False, True, True]


def test_downloads_at_the_same_time_count_each_other(upload, tmp_path, monkeypatch):
    entries = read_card(upload).splits["train"].chunks[:3]
    cache = ChunkCache(tmp_path / "cache", sum(entry.size_bytes for entry in entries) - 1)

    def slow_copy(url: str, target: Path, limit: int) -> None:
        time.sleep(0.3)
        copy_file(url, target, limit)

    def fetch(entry) -> Path:
        return cache.fetch(f"file://{upload}/train/{entry.filename}", entry)

    first = fetch(entries[0])
    monkeypatch.setattr("muse_lightning.data.remote.copy_file", slow_copy)
    with ThreadPoolExecutor(2) as threads:
        others = list(threads.map(fetch, entries[1:]))
    assert [path.exists() for path in (first, *others)] == [False, True, True]


def test_many_readers_download_once(upload, tmp_path, monkeypatch):
    entry = read_card(upload).splits["train"].chunks[0]
    asked = []

    def slow_copy(url: str, target: Path, limit: int) -> None:
        asked.append(url)
        time.sleep(0.2)
        copy_file(url, target, limit)

    monkeypatch.setattr("muse_lightning.data.remote.copy_file", slow_copy)
    chunks = CachedChunks(f"file://{upload}/train", ChunkCache(tmp_path / "cache", 10**6))
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(chunks.fetch, [entry] * 8))) == 1
    assert len(asked) == 1


def test_the_next_chunk_is_fetched_ahead(upload, tmp_path):
    data = module(f"file://{upload}", tmp_path / "cache")
    iterator = iter(data.train_dataloader())
    next(iterator)
    deadline = time.monotonic() + 10
    while len(cached(tmp_path / "cache")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(cached(tmp_path / "cache")) == 2


def test_damage_at_the_source_is_named_and_not_kept(upload, tmp_path):
    name = read_card(upload).splits["train"].chunks[0].filename
    content = bytearray((upload / "train" / name).read_bytes())
    content[100] ^= 4
    (upload / "train" / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"data chunk file://.*{name} is damaged: its SHA-256 is .*; upload the dataset"
    ):
        records(module(f"file://{upload}", tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_damage_in_the_cache_is_mended(upload, tmp_path):
    expected = records(module(f"file://{upload}", tmp_path / "cache"))
    for path in cached(tmp_path / "cache"):
        path.write_bytes(bytes(path.stat().st_size))
    assert records(module(f"file://{upload}", tmp_path / "cache")) == expected


def test_a_killed_download_is_done_again(upload, tmp_path):
    entry = read_card(upload).splits["train"].chunks[0]
    cache = ChunkCache(tmp_path, entry.size_bytes)
    (tmp_path / f"{entry.sha256}.partial").write_bytes(bytes(entry.size_bytes))
    assert cache.fetch(f"file://{upload}/train/{entry.filename}", entry).stat().st_size == entry.size_bytes


@pytest.mark.parametrize(
    ("place", "arguments", "message"),
    [
        ("file://{root}/none", {}, r"file://.*/none/dataset.json: cannot be read: "),
        ("nothing://here", {}, r"nothing://here/dataset.json: .*accepted: s3://, gs://, hf://"),
        ("file://{root}/upload", {"cache_bytes": 10}, r"data.cache_bytes: 10 found, at least [\d,]+ expected"),
    ],
)
def test_mistakes_are_one_line(upload, tmp_path, place, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        records(module(place.format(root=upload.parent), tmp_path / "cache", **arguments))
    assert "\n" not in str(error.value)


class Endless(http.server.BaseHTTPRequestHandler):
    """A file without an end; `/said` tells a length beforehand."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        if self.path == "/said":
            self.send_header("Content-Length", str(1 << 40))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        with contextlib.suppress(OSError):
            while True:
                self.server.sent += self.wfile.write(bytes(1 << 20))

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(("name", "most"), [("said", 0), ("unsaid", 64 << 20)])
def test_a_file_without_an_end_is_not_copied_to_it(tmp_path, name, most):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.sent = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        with pytest.raises(UserError, match=rf"^{url}: more than 1,000,000 bytes found, at most these expected"):
            copy_file(url, tmp_path / "file", 1_000_000)
        server.shutdown()
        assert server.sent <= most


@pytest.mark.parametrize("refused", ["missing", "too long"])
@pytest.mark.parametrize("what", ["tokenizer", "dataset"])
def test_what_is_refused_leaves_nothing(upload, tmp_path, monkeypatch, what, refused):
    monkeypatch.setattr(remote, "_MAX_TOKENIZER_BYTES", 1000)
    monkeypatch.setattr(remote, "_MAX_DESCRIPTION_BYTES", 100)
    (upload / "tokenizer.json").write_bytes(bytes(1001))
    url = f"file://{upload if refused == 'too long' else tmp_path / 'none'}"
    copy = copy_tokenizer if what == "tokenizer" else copy_description
    limit = "1,000" if what == "tokenizer" else "100"
    message = "cannot be read" if refused == "missing" else f"more than {limit} bytes found"
    with pytest.raises(UserError, match=message):
        copy(url, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_was_there_stays(upload, tmp_path):
    folder = copy_description(f"file://{upload}", tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    (upload / "train" / "index.json").rename(upload / "moved")
    with pytest.raises(UserError, match="cannot be read"):
        copy_description(f"file://{upload}", tmp_path / "cache")
    (upload / "moved").rename(upload / "train" / "index.json")
    assert sorted(tmp_path.rglob("*")) == before
    assert read_card(folder) == read_card(upload)


def test_a_chunk_that_is_longer_than_its_card_says(upload, tmp_path):
    name = read_card(upload).splits["train"].chunks[0].filename
    with (upload / "train" / name).open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=rf"^file://.*{name}: more than [\d,]+ bytes found"):
        records(module(f"file://{upload}", tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_card_cannot_name_files_outside_the_cache(upload, tmp_path):
    entry = replace(read_card(upload).splits["train"].chunks[0], sha256="../../escaped")
    with pytest.raises(UserError, match=r"its SHA-256 in dataset.json is '../../escaped'"):
        ChunkCache(tmp_path / "a" / "cache", 10**6).fetch(f"file://{upload}/train/{entry.filename}", entry)
    assert not list(tmp_path.rglob("*escaped*"))


def test_schemes_have_file_systems():
    for scheme, module_name in (("s3", "obstore"), ("gs", "obstore"), ("hf", "huggingface_hub")):
        assert fsspec.get_filesystem_class(scheme).__module__.split(".")[0] == module_name
    assert os.environ["HF_HUB_OFFLINE"] == "1"
