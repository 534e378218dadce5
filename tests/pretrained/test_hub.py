"""Models of the hub: a small server in its place that counts what is asked of it."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from muse_lightning.cli import main
from muse_lightning.errors import UserError
from muse_lightning.pretrained import hub
from muse_lightning.pretrained.hub import download_descriptions, download_weights, is_hub_id
from muse_lightning.pretrained.reference import open_model
from tests.pretrained.checkpoints import bpe_tokenizer, tiny_llama, write_hf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that reading a model takes. Its only model is org/model, of one commit."""

    def __init__(self, folder: Path, asked: list[str], *args: object) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        names = {str(file.relative_to(self.folder)): file.read_bytes() for file in files}
        if not path.removeprefix("/api/models").startswith("/org/model"):
            return self.send(401, {"X-Error-Code": "RepoNotFound"}, b"{}", with_body)
        if path.startswith("/api/models/org/model/tree/"):
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in names.items()
            ]
            return self.send(200, {}, json.dumps(found).encode(), with_body)
        if path.startswith("/api/"):
            if not path.endswith(("org/model", "/main", "/v1", COMMIT)):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", with_body)
            found = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.send(200, {}, json.dumps(found).encode(), with_body)
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if with_body:
            self.asked.append(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(names[name]).hexdigest()}"'}
        return self.send(200, headers, names[name], with_body)

    def send(self, status: int, headers: dict[str, str], content: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Files that were fetched from the server, whose model is in `tmp_path / "served"`."""
    names: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tmp_path / "served", names))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    fetch = partial(
        huggingface_hub.snapshot_download,
        endpoint=f"http://127.0.0.1:{server.server_port}",
        cache_dir=tmp_path / "cache",
        token=False,
    )
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    yield names
    server.shutdown()
    server.server_close()


def download(model: str, revision: str | None = None) -> Path:
    """All of a model."""
    folder = download_descriptions(model, revision)
    download_weights(model, folder)
    return folder


EXTRAS = (
    "modeling.py",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "README.md",
    "onnx/config.json",
    "tf_model.h5",
)


@pytest.mark.parametrize("form", ["single", "shards"])
def test_what_is_needed_is_fetched_once(tmp_path: Path, asked: list[str], form: str) -> None:
    llama = tiny_llama()
    served = write_hf(tmp_path / "served", llama, form=form)
    needed = sorted(path.name for path in served.iterdir())
    for name in EXTRAS:
        (served / name).parent.mkdir(exist_ok=True)
        (served / name).write_bytes(b"not for us")
    folder = download("org/model")
    assert sorted(asked) == needed
    assert all(torch.equal(open_model(folder).tensors[name], tensor) for name, tensor in llama.state_dict().items())
    asked.clear()
    assert download("org/model", "v1") == folder
    assert asked == []


def test_pickles_are_fetched_where_there_is_nothing_else(tmp_path: Path, asked: list[str]) -> None:
    served = write_hf(tmp_path / "served", tiny_llama(), form="pickle-shards")
    (served / "training_args.bin").write_bytes(b"not for us")
    open_model(download("org/model", "main"))
    assert sorted(asked) == sorted(path.name for path in served.iterdir() if path.name != "training_args.bin")


@pytest.mark.parametrize("form", ["shards", "pickle-shards"])
@pytest.mark.parametrize("pattern", ["{number}-of-3.{suffix}", "model.{suffix}-0000{number}.{suffix}", "[{number}]*"])
def test_shards_are_those_that_the_index_names(tmp_path: Path, asked: list[str], form: str, pattern: str) -> None:
    llama = tiny_llama()
    served = write_hf(tmp_path / "served", llama, form=form)
    (index,) = served.glob("*.index.json")
    stem, suffix = index.name.split(".")[:2]
    text = index.read_text()
    for number, file in enumerate(sorted(served.glob("*-of-*"))):
        name = pattern.format(number=number, suffix=suffix)
        text = text.replace(file.name, name)
        file.rename(served / name)
    index.write_text(text)
    needed = sorted(path.name for path in served.iterdir())
    (served / f"{stem}-00001-of-00009.{suffix}").write_bytes(b"of another sharding")
    (served / "1").write_bytes(b"matches a pattern")
    found = open_model(download("org/model"))
    assert sorted(asked) == needed
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize("name", ["../config.json", "onnx/model.safetensors"])
def test_an_index_cannot_ask_for_files_elsewhere(tmp_path: Path, asked: list[str], name: str) -> None:
    served = write_hf(tmp_path / "served", tiny_llama(), form="shards")
    (served / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"names the file {name!r}; accepted: names of files in its own folder" in one_line("org/model")
    assert sorted(asked) == ["config.json", "model.safetensors.index.json"]


def gemma(served: Path, out: Path) -> None:
    fields = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps(fields | {"model_type": "gemma2"}))


def small_vocabulary(served: Path, out: Path) -> None:
    bpe_tokenizer(*(f"<{number}>" for number in range(64)), size=384).save(str(served / "tokenizer.json"))


def something_there(served: Path, out: Path) -> None:
    out.mkdir()
    (out / "precious").touch()


def large(served: Path, out: Path) -> None:
    fields = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps(fields | {"hidden_size": 1 << 20, "intermediate_size": 1 << 29}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gemma, "model_type is 'gemma2'"),
        (small_vocabulary, "tokenizer.json has ids up to"),
        (something_there, "exists already; give a new folder"),
        (large, "output: 6755400.3 GB are to be written, "),
    ],
)
@pytest.mark.parametrize("form", ["single", "shards", "pickle"])
def test_weights_are_fetched_when_all_else_is_right(
    tmp_path: Path,
    asked: list[str],
    change: Callable[[Path, Path], None],
    message: str,
    form: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served, out = write_hf(tmp_path / "served", tiny_llama(), form=form), tmp_path / "out"
    change(served, out)
    before = sorted(out.rglob("*"))
    assert main(["import", "org/model", "--output", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before
    assert {Path(name).suffix for name in asked} <= {".json"}


def test_imported_from_the_hub(tmp_path: Path, asked: list[str]) -> None:
    served = write_hf(tmp_path / "served", tiny_llama(), form="shards")
    assert main(["import", "org/model", "--revision=v1", "--output", str(tmp_path / "out")]) == 0
    found = open_model(tmp_path / "out").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in open_model(served).tensors.items())


def one_line(model: str, revision: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        download(model, revision)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_there(tmp_path: Path, asked: list[str]) -> None:
    write_hf(tmp_path / "served", tiny_llama())
    assert one_line("org/other").startswith("org/other is neither a folder here nor a model on the hub that you may")
    assert (
        one_line("org/model", "v9")
        == "org/model at revision v9 is not on the hub; expected a branch, tag or commit of it"
    )
    assert one_line("org/mo..del").startswith("org/mo..del is no name of a model on the hub: ")


def test_without_a_connection(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", partial(hub.snapshot_download, endpoint="http://127.0.0.1:9"))
    assert (
        one_line("org/model") == "org/model cannot be fetched: Connection refused; check the network, or give a folder"
    )


def test_a_connection_that_breaks(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "served", tiny_llama())
    monkeypatch.setattr(Hub, "send", lambda *args: None)
    message = one_line("org/model")
    assert message.startswith("org/model cannot be fetched: ")
    assert message.endswith("; check the network, or give a folder")


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("a paragraph") from OfflineModeIsEnabled("offline")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert one_line("org/model").startswith("org/model is not in the cache, and HF_HUB_OFFLINE is set; unset it or")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("gpt2", True), ("Qwen/Qwen2.5-Coder-7B", True), ("./x", False), ("/x", False), ("~/x", False), ("a/b/c", False)],
)
def test_names_on_the_hub(source: str, expected: bool) -> None:
    assert is_hub_id(source) == expected
