"""The verbs `prepare` and `info`."""

from pathlib import Path

import pytest

from tests.recipe import RECIPE, Muse


def test_prepare_needs_neither_model_nor_context(muse: Muse) -> None:
    data = RECIPE[RECIPE.index("data:") :]
    Path("data.yaml").write_text(data.replace("  seq_len: 32\n  batch_size: 2\n", ""))
    code, _, err = muse("prepare", "--config", "data.yaml")
    assert code == 0, err
    assert Path("dataset/dataset.json").is_file()
    assert "up to date" not in err
    code, _, err = muse("prepare", "--config", "data.yaml", "--data.seq_len=100000")
    assert code == 0
    assert "data: dataset is up to date\n" in err
    warning = "data: warning: as it is, muse fit would end with: data.seq_len: 100000 found; split 'train' ("
    assert len([line for line in err.splitlines() if line.startswith(warning)]) == 1
    code, _, err = muse("prepare", "--config", "data.yaml", "--data.ranks_per_block=2")
    assert (code, "warning" in err) == (0, False)
    code, _, err = muse("prepare", "--config", "data.yaml", "--data.sources=null")
    assert (code, "data: dataset: used as prepared, for data.sources is null\n" in err) == (0, True)
    assert muse.error("prepare", "--config=data.yaml", "--data.sources=null", "--data.dataset=new").startswith(
        "new is not a prepared dataset"
    )


def test_prepare_refuses_what_is_no_whole_dataset(muse: Muse) -> None:
    """In one line, and not as a warning, whatever the context; only a context that the user chose is a warning."""
    data = RECIPE[RECIPE.index("data:") :]
    Path("data.yaml").write_text(data.replace("  seq_len: 32\n  batch_size: 2\n", ""))
    assert muse("prepare", "--config", "data.yaml")[0] == 0
    used = ["prepare", "--config=data.yaml", "--data.sources=null"]
    code, _, err = muse(*used, "--data.batch_size=1000000")
    assert (code, "warning" in err) == (0, False)
    other = "--data.special_tokens.end=<eos>"
    assert muse.error(*used, other).startswith("data.special_tokens: end '<eos>' found")
    next(Path("dataset/train").glob("*.bin")).write_bytes(b"")
    for args in ([], ["--data.seq_len=100000"]):
        assert muse.error(*used, *args).startswith("data chunk dataset/train/")


def test_the_longest_context(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    whole = ("--data.batch_size=1", "--model.loss_chunk=1024")
    monkeypatch.setattr("muse_lightning.training.levers.Setting.peak", lambda _, tokens: 10**6 + 1000 * tokens)
    code, out, err = muse.with_recipe("info", "--longest_context", "--memory_gib=0.0035", *whole)
    assert code == 0, err
    head, as_it_is, *levers, limit = out.splitlines()
    assert head.startswith("longest context by prediction on a GPU of 0.0035 GiB,")
    assert as_it_is.endswith("  as it is")
    # All but a twentieth of the memory, in whole chunks of the recipe's attention.
    longest = int(as_it_is.split()[0].replace(",", ""))
    assert longest % 16 == 0
    assert 0.97 < longest / ((0.95 * 0.0035 * 2**30 - 10**6) / 1000) <= 1
    assert [line.split()[1] for line in levers] == [
        "model.recompute=keep_attention",
        "model.recompute=block",
        "model.offload=true",
        "model.mlp_tiles=8",
    ]
    assert limit == "model.config.max_position_embeddings, now 64, must be as long"
    assert muse.error("info", "--config=recipe.yaml", "--longest_context") == (
        "--longest_context: no GPU here; --memory_gib=80 says how much one has"
    )
    assert muse.error("info", "--config=recipe.yaml", "--memory_gib=80") == (
        "--memory_gib=80: accepted beside --longest_context alone"
    )
    assert muse.error("fit", "--config=recipe.yaml", "--verify_every=0") == (
        "verify_every: expected an integer above 0 or null, found 0 (command line)"
    )
    assert muse.error("info", "--config=recipe.yaml", "--longest_context", "--memory_gib=-1") == (
        "memory_gib: expected a number above 0 or null, found -1 (command line)"
    )


def test_no_word_of_positions_where_no_context_is_longer(muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muse_lightning.training.levers.Setting.peak", lambda _, tokens: 10**12)
    code, out, err = muse.with_recipe("info", "--longest_context", "--memory_gib=1")
    assert code == 0, err
    levers = out.splitlines()[1:]
    assert [line[:12] for line in levers] == ["does not fit"] * len(levers)
    assert len(levers) > 1
