"""Files that run code where nobody guards: each is first shown to, then refused, with nothing imported or written.

docs/fuzzing.md lists all attacks; those on class paths are in tests/test_hostile_configuration.py, on pickles also in
tests/pretrained/test_tensors.py, on litdata's index in tests/data/test_block_reader.py.
"""

import http.server
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.cloud_io import _load

from muse_lightning.errors import UserError
from muse_lightning.pretrained.run_folder import run_configuration
from muse_lightning.training.weights import check_checkpoint, read_checkpoint
from tests.recipe import Muse


class Touch:
    """Unpickles by creating a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """What hostile files create."""
    return tmp_path / "ran"


@pytest.fixture
def evil(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of the working directory that leaves a trace when it is imported."""
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n\n\ndef make(*_, **__): ...\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    yield
    sys.modules.pop("evil", None)


def shown_to_run(ran: Path) -> None:
    assert ran.exists()
    ran.unlink()


def test_code_in_hyper_parameters(tmp_path: Path, ran: Path) -> None:
    file = tmp_path / "a.ckpt"
    whole = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "optimizer_states": [], "lr_schedulers": []}
    torch.save(whole | {"hyper_parameters": {"width": Touch(ran)}}, file)
    _load(file, weights_only=False)
    shown_to_run(ran)
    with pytest.raises(UserError, match=r"is not a Lightning checkpoint of tensors: it needs .*, which is not run"):
        check_checkpoint(str(file), for_training=True)
    assert not ran.exists()


def test_names_in_hyper_parameters(muse: Muse, evil: None) -> None:
    """Pure data that Lightning before 2.6.6 imported (GHSA-qqmf-gpg7-g8gw): a checkpoint's hyperparameters are not
    even looked at."""
    assert muse.with_recipe("fit", "--trainer.max_steps=1")[0] == 0
    checkpoint = read_checkpoint(Path("runs/tiny/version_0/checkpoints/step=1.ckpt"), "test")
    checkpoint["hyper_parameters"] = {
        "_class_path": "evil.make",
        "_instantiator": "evil.make",
        "class_path": "evil.make",
    }
    torch.save(checkpoint, "other.ckpt")
    __import__("evil")  # as the instantiator is
    shown_to_run(Path("ran"))
    del sys.modules["evil"]
    code, _, err = muse.with_recipe("validate", "--ckpt_path=other.ckpt")
    assert code == 0, err
    assert "evil" not in sys.modules
    assert not Path("ran").exists()


def test_a_checkpoint_at_an_address(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": Touch(ran)}, tmp_path / "a.ckpt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.ckpt"
        _load(address)
        shown_to_run(ran)
        asked.clear()
        with pytest.raises(UserError, match="is an address; expected the path of a local checkpoint"):
            check_checkpoint(address, for_training=True)
        server.shutdown()
    assert not asked
    assert not ran.exists()


def test_code_in_the_configuration_of_a_run(tmp_path: Path, ran: Path) -> None:
    text = f"model: !!python/object/apply:os.system ['touch {ran}']\n"
    (tmp_path / "config.yaml").write_text(text)
    yaml.unsafe_load(text)
    shown_to_run(ran)
    with pytest.raises(UserError, match=r"config.yaml cannot be read: could not determine a constructor"):
        run_configuration(tmp_path)
    assert not ran.exists()


def test_class_paths_in_the_configuration_of_a_run(muse: Muse, evil: None) -> None:
    """As `muse fit --config runs/NAME/version_0/config.yaml` repeats a run that somebody else has sent."""
    run = Path("runs/sent/version_0")
    run.mkdir(parents=True)
    text = Path("recipe.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("max_steps: 2", "max_steps: 2\n  callbacks: [{class_path: evil.make}]")
    )
    __import__("evil")
    shown_to_run(Path("ran"))
    del sys.modules["evil"]
    line = muse.error("fit", f"--config={run / 'config.yaml'}")
    assert "evil.make is outside the modules a configuration may name" in line
    assert "evil" not in sys.modules
    assert not Path("ran").exists()


@pytest.mark.slow
def test_code_beside_a_tokenizer(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers runs what tokenizer_config.json names where somebody trusts it; we read tokenizer.json alone."""
    transformers = pytest.importorskip("transformers")
    from muse_lightning.model.config import LlamaConfig
    from muse_lightning.pretrained.tokenizer_files import folder_tokenizer
    from tests.fuzz.readers import CORPUS

    folder = tmp_path / "model"
    folder.mkdir()
    seed = (CORPUS / "tokenizer" / "seed-byte-level.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(seed)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}')
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Evil(PreTrainedTokenizerFast): ...\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    shown_to_run(ran)
    tokenizer = folder_tokenizer(folder, LlamaConfig(320, 16, 32, 2, 4, 2, 64))
    assert tokenizer is not None
    assert not ran.exists()
