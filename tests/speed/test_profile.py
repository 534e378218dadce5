"""A whole profile with instruments that run everything once: what adds up to what, and the files."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from muse_lightning.measure.bench.parts import BETWEEN
from muse_lightning.measure.bench.timing import Ceilings, Run
from muse_lightning.measure.info import result_header
from muse_lightning.recipe_cli import MuseCLI
from muse_lightning.speed import profile as under_test
from muse_lightning.speed.parts import Part, time_parts
from muse_lightning.speed.profile import Profile, ProfileOptions, page, profile, records, table
from muse_lightning.speed.recorder import TRACE_NAME
from muse_lightning.training.module import LanguageModel
from tests.recipe import RECIPE
from tests.speed.test_parts import Milliseconds


class WithKernels(Milliseconds):
    """One kernel of MuSe's and one of a library, in a pass of 3 ms."""

    def kernel_times(self, run: Run) -> dict[str, float]:
        run()
        return {"muse_far_kernel": 0.5, "cudnn_flash_bprop": 1.0}


def profile_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **of_model: Any) -> Profile:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(under_test, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9))

    def parts_of_a_plain_model(model: LanguageModel, *arguments: Any) -> list[Part]:
        # What is computed again is added up; a model that does it too would count it twice.
        assert model.recompute == "none"
        return time_parts(model, *arguments)

    monkeypatch.setattr(under_test, "time_parts", parts_of_a_plain_model)
    recipe = yaml.safe_load(RECIPE)
    recipe["model"] |= {"recompute": "block", **of_model}
    recipe["trainer"]["accumulate_grad_batches"] = 2
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli = MuseCLI("profile", "", ["--config", "recipe.yaml"], [], builds="model", options=ProfileOptions)
    return profile(cli, ProfileOptions(warmup=1, steps=2, traced_steps=1), WithKernels(), tmp_path)


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    return profile_of(tmp_path, monkeypatch)


def test_parts_kernels_and_rest_make_the_step(found: Profile, tmp_path: Path) -> None:
    assert (tmp_path / TRACE_NAME).exists()
    assert len(found.whole.seconds) == 2
    by_name = {part.name: part.ms for part in found.parts}
    # Two layers of 3 ms and once more forward; a head and an embedding; the optimizer runs once for both micro-batches.
    assert by_name == {
        "embedding": 3.0,
        "before attention": 8.0,
        "attention": 8.0,
        "after attention": 8.0,
        "head and loss": 3.0,
        "clipping and optimizer": 3.0,
    }
    assert found.rest_ms == pytest.approx(found.step_ms - 2 * 30.0 - 3.0)
    assert {each.name: each.ms for each in found.kernels["attention"]}[BETWEEN] == pytest.approx(1.5)


def test_the_table_counts_every_micro_batch(found: Profile) -> None:
    head, *rows = table(found)
    ms = {row[0].strip(): float(row[head.index("ms")]) for row in rows}
    assert ms["attention"] == 16.0
    assert ms["clipping and optimizer"] == 3.0
    kernels = [float(row[1]) for row in rows if row[0].startswith("  ")]
    assert sum(kernels) == pytest.approx(ms["attention"], abs=0.02)
    parts = [float(row[1]) for row in rows[:-1] if not row[0].startswith("  ")]
    assert sum(parts) == pytest.approx(ms["step"], abs=0.05)


def test_the_files(found: Profile) -> None:
    assert "| attention | 16.00 |" in page(result_header("cpu"), found)
    assert [each["record"] for each in records(found)].count("part") == 6


def test_kernels_stand_under_their_kind_of_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = {"class_path": "SpatialBlocks", "init_args": {"chunk": 16, "query_cluster": 4, "key_cluster": 4}}
    found = profile_of(tmp_path, monkeypatch, attention=attention, exact_layers=[0])
    names = [row[0] for row in table(found)]
    for kind in ("Dense", "SpatialBlocks"):
        assert names[names.index(f"attention, {kind}") + 1].startswith("  ")
    parts = {each["part"] for each in records(found) if each["record"] == "kernels of attention"}
    assert parts == {"attention, Dense", "attention, SpatialBlocks"}
