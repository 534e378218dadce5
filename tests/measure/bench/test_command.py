"""`muse bench attention` as a user meets it, and its whole run with instruments that need no GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_kernels import muse_attention
from muse_lightning.cli import main
from muse_lightning.measure.bench import command, gate, timing
from muse_lightning.measure.bench.command import run_benchmark, write
from muse_lightning.measure.bench.inputs import Heads
from tests.measure.bench.fabricated import SMALL, FakeInstruments, settings

Output = pytest.CaptureFixture[str]


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_gpu")
class TestCommandLine:
    @pytest.mark.parametrize(
        ("flags", "line"),
        [
            ([], "muse bench attention needs an NVIDIA GPU; --check_only=true checks without timing, on any machine"),
            (["--lengths=[8192,0]"], "lengths: expected positive numbers of tokens, found [8192, 0]"),
            (["--lengths=[]"], "lengths: expected at least one number of tokens, found []"),
            (["--documents=[-1]"], "documents: expected positive numbers of tokens, found [-1]"),
            (["--kv_heads=3"], "heads: expected a multiple of kv_heads, found heads=16, kv_heads=3"),
            (["--head_dim=12"], "head_dim: expected a multiple of 8, found 12"),
            (["--peers=[cudn]"], "peers: expected [one of cudnn, flash, flex, nsa, reference], found ['cudn']"),
            (["--dtype=float32"], "dtype: expected one of bfloat16, float16, found 'float32'"),
            (["--muse.top_k=-1"], "top_k must be at least 0, got -1"),
            (["--muse.topk=1"], "muse.topk: not a parameter of MuseOptions; nearest: top_k"),
            (["--inputs=recorded"], "inputs: 'recorded' needs files"),
            (["--recorded=[nothing.pt]"], "recorded: cannot read nothing.pt"),
            (["--repeats=0"], "repeats and seconds must be positive, found repeats=0"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_mistakes_are_one_line(self, flags: list[str], line: str, capsys: Output) -> None:
        assert main(["bench", "attention", *flags]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {line}")
        assert (err.count("\n"), out) == (1, "")
        assert not list(Path().iterdir())

    def test_recorded_heads_that_do_not_fit(self, capsys: Output) -> None:
        torch.save(torch.zeros(3, 5, 48), "head.pt")
        assert main(["bench", "attention", "--recorded=[head.pt]", "--inputs=recorded"]) == 2
        assert "head_dim: expected a multiple of 48, as recorded, found 128" in capsys.readouterr().err

    def test_the_check_alone(self, capsys: Output) -> None:
        flags = ["--check_only=true", "--heads=2", "--kv_heads=1", "--head_dim=16", "--documents=[100]"]
        assert main(["bench", "attention", *flags]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("check on cpu of plain PyTorch alone")
        assert ": 18 comparisons with the reference passed; nearest to its limit, " in out
        assert err == ""
        assert not list(Path().iterdir())

    def test_a_red_check_ends_with_code_1(self, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(*qkv: Tensor, **options: Any) -> Any:
            factor = 1.1 if options["implementation"] == "auto" else 1.0
            return muse_attention(*qkv, **options) * factor

        monkeypatch.setattr(gate, "muse_attention", wrong)
        flags = ["--check_only=true", "--heads=2", "--kv_heads=1", "--head_dim=16"]
        assert main(["bench", "attention", *flags]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: muse_attention is wrong, nothing is timed: one document: out (largest) error ")
        assert err.count("\n") == 1


class TestNothingIsTimedWhenTheCheckIsRed:
    @pytest.mark.parametrize("is_right", [True, False])
    def test_on_a_machine_with_a_gpu(self, is_right: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        timed: list[str] = []

        def benchmark(*arguments: Any) -> None:
            timed.append("timed")
            raise KeyboardInterrupt

        check = gate.Check("one document", "dq (mean)", 0.0 if is_right else float("nan"), 1.0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(command, "run_gate", lambda *arguments, **options: [check])
        monkeypatch.setattr(command, "CudaInstruments", lambda *arguments: FakeInstruments())
        monkeypatch.setattr(command, "run_benchmark", benchmark)
        with pytest.raises(KeyboardInterrupt if is_right else SystemExit):
            command.bench_attention(out=tmp_path / "new")
        assert timed == (["timed"] if is_right else [])
        assert not list(tmp_path.iterdir())


class TestRun:
    @pytest.fixture(autouse=True)
    def _small_ceilings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "MATRIX_SIZE", 16)
        monkeypatch.setattr(timing, "COPIED_BYTES", 1024)

    @pytest.mark.parametrize("documents", [(), (100, 60)], ids=["one document", "documents"])
    def test_everything_is_measured_and_written(
        self, documents: tuple[int, ...], tmp_path: Path, capsys: Output
    ) -> None:
        recorded = {"head": torch.randn(3, 200, 16)}
        chosen = settings(
            lengths=(256, 320),
            documents=documents,
            recorded=recorded,
            uses_recorded=True,
            peers=("nsa", "reference"),
            heads=Heads(4, 2, 16, torch.bfloat16),
        )
        instruments = FakeInstruments()
        results = run_benchmark(chosen, [], instruments)
        passes = [f"{name} {of_pass}" for name in ("muse", "reference") for of_pass in ("forward", "forward_backward")]
        assert instruments.timed == ["product", "copy", *passes, *passes]
        assert [(m.variant, m.num_tokens) for m in results.measured] == [
            (variant, num_tokens) for num_tokens in (256, 320) for variant in ("muse", "nsa", "reference")
        ]
        muse, nsa = results.measured[:2]
        assert muse.timings["forward_backward"].median_ms == 2
        assert muse.peak_mib == 3
        assert 0 < muse.flops_fraction["forward"] < muse.flops_fraction["forward_backward"]
        assert nsa.reason is not None
        assert [part.name for part in results.parts[320]] == ["near", "far", "far backward", "other", "between kernels"]
        assert [error.top_k for error in results.errors] == [0, 1, 2, 4]

        (tmp_path / "results").mkdir()
        write(results, tmp_path / "results")
        assert {path.name for path in tmp_path.rglob("*")} == {
            "results",
            "results.jsonl",
            "results.md",
            "attention.png",
        }
        header = json.loads((tmp_path / "results/results.jsonl").read_text().splitlines()[0])
        assert header["options"]["documents"] == list(documents)
        assert header["options"]["muse"]["chunk"] == 64
        printed = capsys.readouterr().out
        assert "MuSe, plain PyTorch" in printed
        assert "between kernels" in printed

    def test_a_peer_that_fails_is_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: Any, **options: Any) -> Tensor:
            raise RuntimeError("no kernel\nfor this")

        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", fail)
        results = run_benchmark(settings(peers=("cudnn", "flash")), [], FakeInstruments())
        assert [m.reason for m in results.measured] == [None, *["failed: RuntimeError: no kernel for this"] * 2]

    def test_what_does_not_fit_into_memory_is_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: Any, **options: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("muse_lightning.measure.bench.variants.muse_attention", fail)
        results = run_benchmark(settings(peers=()), [], FakeInstruments())
        assert [m.reason for m in results.measured] == ["out of memory"]
        assert results.parts == {}

    def test_a_failure_of_muse_is_a_bug(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: Any, **options: Any) -> Tensor:
            raise RuntimeError("wrong")

        monkeypatch.setattr("muse_lightning.measure.bench.variants.muse_attention", fail)
        with pytest.raises(RuntimeError, match="wrong"):
            run_benchmark(settings(), [], FakeInstruments())

    def test_a_folder_that_exists_is_not_overwritten(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        (tmp_path / "precious").touch()
        with pytest.raises(command.UserError, match=r"out: .* exists already; give a new folder"):
            command.bench_attention(muse=SMALL, out=tmp_path)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    command.bench_attention(
        lengths=(16384,), heads=4, kv_heads=4, head_dim=64, seconds=0.05, repeats=5, out=tmp_path / "results"
    )
    lines = [json.loads(line) for line in (tmp_path / "results/results.jsonl").read_text().splitlines()]
    timed = {line["variant"] for line in lines if "median_ms" in line}
    assert timed >= {"muse", "cudnn", "flash", "flex"}
    assert {line["name"] for line in lines if line["record"] == "part"} > {"near", "near backward"}
