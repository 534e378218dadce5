"""Rates against a clock that the test sets, FLOPs against their definition, MFU only where the peak is known."""

import itertools
from functools import partial

import pytest
import torch

import muse_lightning.callbacks.throughput as throughput
from muse_lightning.attention import Dense, Muse
from muse_lightning.callbacks import DeviceThroughput
from muse_lightning.measure.flops import matrix_parameters, training_flops_per_token
from tests.tiny import SEQ_LEN, TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer


@pytest.fixture
def clock(monkeypatch):
    """Time that passes one second with each look at it."""
    looks = iter(range(1000))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(looks)))


def fit(tmp_path, data, val=(), attention=tiny_muse, **options):
    model = tiny_model(attention=attention)
    trainer = tiny_trainer(tmp_path, callbacks=[DeviceThroughput()], **options)
    trainer.fit(model, TinyData(data, list(val)))
    logged = scalars(trainer)
    return model, {tag: values for tag, values in logged.items() if tag.startswith("throughput/")}


def test_tokens_per_second_of_the_steps_since_the_last_log(tmp_path, clock):
    _, logged = fit(tmp_path, batches(8), log_every_n_steps=2, accumulate_grad_batches=2, max_steps=4)
    # Two steps of two batches of two rows, in the one second between two looks.
    assert logged == {"throughput/device/tokens_per_sec": [(1, 8 * SEQ_LEN), (3, 8 * SEQ_LEN)]}


def test_time_in_validation_is_left_out(tmp_path, clock):
    _, logged = fit(tmp_path, batches(2), batches(1), max_steps=2, val_check_interval=1)
    # Looks: start 0; log 1; validation from 2 to 3; log 4. Second step: 4 - 1 without the one second of validation.
    assert [value for _, value in logged["throughput/device/tokens_per_sec"]] == [2 * SEQ_LEN, 2 * SEQ_LEN / 2]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_mfu_counts_the_packed_documents(tmp_path, clock, monkeypatch, packed):
    monkeypatch.setattr(throughput, "_peak", lambda trainer: 1e6)
    data = batches(4, packed=packed)
    model, logged = fit(tmp_path, data, max_steps=2, accumulate_grad_batches=2)
    for step in (0, 1):
        lengths = []
        for batch in data[2 * step : 2 * step + 2]:
            ends = batch["cu_seqlens"].tolist() if packed else [0, SEQ_LEN, 2 * SEQ_LEN]
            lengths += [end - start for start, end in itertools.pairwise(ends) if end > start]
        assert sum(lengths) == 4 * SEQ_LEN
        own, dense = (training_flops_per_token(model.llama, lengths, which) for which in (None, [Dense(0)]))
        # The rest are products with weights.
        of_attention = own - 6 * matrix_parameters(model.llama)
        for name, per_token in (("mfu", own), ("mfu_attention", of_attention), ("mfu_dense_equivalent", dense)):
            expected = pytest.approx(per_token * sum(lengths) / 1e6, rel=1e-5)
            assert logged[f"throughput/device/{name}"][step] == (step, expected)


def test_packed_documents_are_not_counted_as_rows(tmp_path, clock, monkeypatch):
    """Muse is exact up to 7 chunks of a row, and up to 2 of a packed document: here of 4."""
    monkeypatch.setattr(throughput, "_peak", lambda trainer: 1e6)
    cu_seqlens = torch.tensor([0, SEQ_LEN, 2 * SEQ_LEN], dtype=torch.int32)
    data = [{**batch, "cu_seqlens": cu_seqlens} for batch in batches(1)]
    size = SEQ_LEN // 4
    muse = partial(Muse, chunk=size, query_cluster=size // 2, key_cluster=size // 2, top_k=1, candidates=1)
    model, logged = fit(tmp_path, data, attention=muse, max_steps=1)
    per_token = training_flops_per_token(model.llama, [SEQ_LEN] * 2, has_documents=True)
    assert per_token < training_flops_per_token(model.llama, [SEQ_LEN] * 2)
    expected = pytest.approx(per_token * 2 * SEQ_LEN / 1e6, rel=1e-5)
    assert logged["throughput/device/mfu"] == [(0, expected)]


def test_the_peak_is_known_for_half_precision_on_known_gpus_only(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, precision="bf16-mixed")
    assert throughput._peak(trainer) is None
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert throughput._peak(trainer) == 989e12
    full = tiny_trainer(tmp_path, precision="32-true")
    assert throughput._peak(full) is None
