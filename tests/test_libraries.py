"""Imports that nobody needs stay out, and what is needed works without them."""

import gc
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.seed import seed_everything

from muse_lightning.cli import main
from muse_lightning.errors import ExitCode
from muse_lightning.libraries import importing, quiet_libraries


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """What a process tells of itself that has run a command: modules, the garbage collector, how often it has run."""
    program = (
        "import gc, sys; passes = []; gc.callbacks.append(lambda phase, _: passes.append(phase))\n"
        "from muse_lightning.cli import main; main(['info'])\n"
        "print(sorted({'transformers', 'matplotlib.pyplot', 'torchvision'} & set(sys.modules)))\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000, len(passes))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_lightning_without_what_torchmetrics_brings(imported: list[str]) -> None:
    assert imported[-2] == "[]"


def test_modules_are_no_garbage(imported: list[str]) -> None:
    """A command's process looks for garbage again once it has imported what it needs, and no more among that."""
    is_enabled, is_frozen, passes = imported[-1].split()
    assert (is_enabled, is_frozen) == ("True", "True")
    assert int(passes) < 500, "2,300 if it goes on while modules are imported"


def test_who_has_lightning_keeps_the_garbage_collector() -> None:
    """What a caller has, a notebook perhaps, may become garbage yet."""
    before = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_cache_for_compiled_code_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    # As in a container whose volume for runs belongs to another user. Root may write everywhere, below a file nobody.
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "muse_lightning.cli", "info"]
    folder = tmp_path / "file/.cache/torchinductor"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == ExitCode.STORAGE, done.stderr
    assert done.stderr == (
        f"error: TORCHINDUCTOR_CACHE_DIR={folder}: {tmp_path}/file/.cache: Not a directory; "
        f"accepted: a folder that user id {os.getuid()} can write to\n"
    )


def test_no_folder_for_temporary_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    # The system's own folders, which exist where tests run.
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    assert main(["info"]) == ExitCode.STORAGE
    assert capsys.readouterr().err == (
        f"error: TMPDIR={tmp_path}/missing: No usable temporary directory found in ['{tmp_path}/missing']; "
        f"accepted: a folder that user id {os.getuid()} can write to\n"
    )


def test_only_listed_messages_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with warnings.catch_warnings(record=True) as caught, quiet_libraries(), caplog.at_level("INFO", logger.name):
        warnings.warn("The dirpath has changed from 'a' to 'b', therefore `best_model_score`", stacklevel=1)
        warnings.warn(
            "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided during "
            "`Trainer` instantiation. Please add the following callbacks: ['NumericsGuard'].",
            stacklevel=1,
        )
        warnings.warn("something that matters", stacklevel=1)
        logger.info("💡 Tip: For seamless cloud logging")
        seed_everything(torch.initial_seed() % 2**32)
        logger.info("GPU available: True")
    assert [str(warning.message) for warning in caught] == ["something that matters"]
    assert [record.getMessage() for record in caplog.records] == ["GPU available: True"]
