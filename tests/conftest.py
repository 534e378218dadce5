"""What every test runs under: kernels interpreted where there is no GPU, fixed seeds, unwritten memory full of NaN."""

import gc
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Triton reads the flag when a kernel is decorated, so it has to stand before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# No test may open a window or a connection.
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor may a developer's shell decide what is printed.
for _name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "MUSE_TRACEBACK"):
    os.environ.pop(_name, None)

SEED = 20250912
SLOW_TIMEOUT_S = 1800


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported does not become garbage: to look for some among it takes a third of the time of the imports."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, when somebody selects them on a machine without one. Slow tests have a longer time limit
    and go first, the demo before all, so that at the end no process waits for another (--dist worksteal)."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
    items.sort(key=lambda item: (item.path.name != "test_demo.py", item.get_closest_marker("slow") is None))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One thread for each process: tensors in tests are small, and threads that wait for each other cost more than they
    save. Several cores are used by several processes (pytest --numprocesses).
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Start each test from the same state of every random generator, whichever tests ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, but every element it leaves unwritten shows: NaN, or an integer too large to be an index."""

    @wraps(allocate)
    def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.layout is not torch.strided:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype is not torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_and_fill


@pytest.fixture(autouse=True, scope="session")
def _poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty and its relatives return: an output left unwritten fails instead of passing by luck."""
    # torch.device as a context looks up once, by identity, which functions it redirects: it must see the real ones.
    with torch.device("meta"):
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ]:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter() -> Iterator[None]:
    """Kernels are interpreted in most of the tests' time."""
    from tests.interpreter import quick_interpreter

    with quick_interpreter():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels are tested on: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the recipe for tests (tests/recipe.py), prepared once: to be copied where one is needed."""
    from muse_lightning.cli import main
    from tests.recipe import write_recipe

    folder = tmp_path_factory.mktemp("tiny")
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["prepare", "--config", "recipe.yaml"]) == 0
    return folder / "dataset"


@pytest.fixture
def muse_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`tests.recipe.Muse` in a working directory of its own."""
    from tests.recipe import Muse

    monkeypatch.chdir(tmp_path)
    return Muse(tmp_path, capsys)


@pytest.fixture
def muse(muse_in_a_folder: Any) -> Any:
    """The same; a module that asks for more of it has a fixture of this name."""
    return muse_in_a_folder


@pytest.fixture
def muse_with_dataset(muse_in_a_folder: Any, tiny_dataset: Path) -> Any:
    """The same with the recipe's dataset."""
    shutil.copytree(tiny_dataset, "dataset")
    return muse_in_a_folder
