"""LanguageModel under a Trainer: what it minimises, logs, stores and refuses, read back from event files."""

import math
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from torch._dynamo.utils import counters

import muse_lightning.training.module as module
from muse_lightning import parallelize
from muse_lightning.attention import Dense, SlidingWindow, SpatialBlocks
from muse_lightning.errors import UserError
from tests.tiny import SEQ_LEN, VOCAB, LargestTensor, TinyData, batches, scalars, tiny_model, tiny_muse, tiny_trainer


def losses(trainer):
    return [value for _, value in scalars(trainer)["train/loss"]]


def whole_logits_loss(model, some_batches):
    """Sum of nats, and number of labels, by cross entropy over all logits."""
    nats, count = 0.0, 0
    for batch in some_batches:
        with torch.no_grad():
            logits = model.llama(batch["input_ids"], cu_seqlens=batch.get("cu_seqlens"))
        nats += F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").item()
        count += (batch["labels"] != -100).sum().item()
    return nats, count


def test_training_learns_and_logs(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=12, log_every_n_steps=3, callbacks=[LearningRateMonitor("step")])
    trainer.fit(tiny_model(learning_rate=0.03), TinyData(batches(12, batch_size=4)))
    logged = scalars(trainer)
    # Lightning numbers steps from 0.
    assert [step for step, _ in logged["train/loss"]] == [2, 5, 8, 11]
    assert logged["train/tokens"][-1] == (11, 12 * 4 * SEQ_LEN)
    assert "lr-AdamW/pg1" in logged
    assert logged["train/loss"][0][1] < math.log(VOCAB)
    assert logged["train/loss"][-1][1] < logged["train/loss"][0][1] - 0.2


def test_logged_loss_is_that_of_the_last_step_however_often_it_is_logged(tmp_path):
    found = []
    for interval in (1, 2):
        L.seed_everything(1, verbose=False)
        trainer = tiny_trainer(tmp_path / str(interval), log_every_n_steps=interval)
        trainer.fit(tiny_model(), TinyData(batches(4)))
        found.append(dict(scalars(trainer)["train/loss"]))
    assert found[1] == {step: found[0][step] for step in (1, 3)}


def test_minimised_loss_divides_by_a_constant_and_logged_loss_by_labels(tmp_path):
    [batch] = batches(1)
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(model, TinyData([batch]))
    model = tiny_model()
    model.configure_model()
    nats, count = whole_logits_loss(model, [batch])
    model._trainer = trainer
    assert count < 2 * SEQ_LEN
    assert model.training_step(batch, 0).item() == pytest.approx(nats / (2 * SEQ_LEN), rel=1e-5)
    assert losses(trainer) == pytest.approx([nats / count], abs=0.1)


def test_no_tensor_of_all_logits_in_a_step(tmp_path):
    [batch] = batches(1)
    model = tiny_model(config={"vocab_size": 512}, loss_chunk=16)
    trainer = tiny_trainer(tmp_path, max_steps=2)
    with LargestTensor() as watched:
        trainer.fit(model, TinyData([batch, batch], [batch]))
    assert watched.elements == 512 * 16  # the embedding, and a chunk of logits
    assert watched.elements < 2 * SEQ_LEN * 512


def test_accumulation_equals_one_large_batch(tmp_path):
    small = batches(8, batch_size=1)
    large = []
    for first, second in zip(small[::2], small[1::2], strict=True):
        ends = [first["cu_seqlens"], SEQ_LEN + second["cu_seqlens"]]
        large.append(
            {
                "input_ids": torch.cat([first["input_ids"], second["input_ids"]]),
                "labels": torch.cat([first["labels"], second["labels"]]),
                "cu_seqlens": torch.cat(ends),
            }
        )
    results = []
    for name, data, accumulate in [("small", small, 2), ("large", large, 1)]:
        L.seed_everything(1, verbose=False)
        model = tiny_model()
        trainer = tiny_trainer(tmp_path / name, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
        trainer.fit(model, TinyData(data))
        results.append((losses(trainer), [p.detach() for p in model.parameters()], scalars(trainer)["train/tokens"]))
    assert len(results[0][0]) == 4
    # Other order of float32 additions; four steps of AdamW amplify it (it divides by a small second moment).
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-3)
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_there_from_a_backward_pass_to_the_end_of_its_step(tmp_path, monkeypatch, accumulate):
    """The forward pass of the next step does not hold those of the last one; that of a later micro-batch does."""
    held = []
    step = module.LanguageModel.training_step

    def training_step(self, batch, batch_idx):
        held.append(sum(parameter.grad is not None for parameter in self.parameters()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(module.LanguageModel, "training_step", training_step)
    model = tiny_model()
    tiny_trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate).fit(
        model, TinyData(batches(3 * accumulate))
    )
    every = len(list(model.parameters()))
    assert held == [0, every][:accumulate] * 3


def test_tokens_that_ranks_share_are_counted_once():
    model = tiny_model()
    model.configure_model()
    data = TinyData(batches(1))
    for ranks_per_block, tokens in [(None, 8), (2, 8 + 4), (8, 8 + 4 + 1)]:
        if ranks_per_block is not None:
            data.ranks_per_block = ranks_per_block
        trainer = SimpleNamespace(world_size=8, datamodule=data)
        model.trainer = trainer
        model.training_step(data.train[0], 0)
        assert model.tokens_seen == tokens * 2 * SEQ_LEN


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_sums_over_batches_of_unequal_size(tmp_path, stage, window):
    data = batches(2, batch_size=2) + batches(1, batch_size=1, seed=5)
    token_bytes = torch.arange(VOCAB) + 1
    token_bytes[3] = 0
    # Far from 0, so that attention shows in the loss.
    config = {"initializer_range": 0.5, "sliding_window": window}
    model = tiny_model(config=config, attention=tiny_muse, exact_val_batches=2)
    trainer = tiny_trainer(tmp_path)
    run = trainer.validate if stage == "val" else trainer.test
    run(model, TinyData([], data, token_bytes), verbose=False)
    found = {tag: values[0][1] for tag, values in scalars(trainer).items()}

    nats, count = whole_logits_loss(model, data)
    length = sum(token_bytes[batch["labels"][batch["labels"] != -100]].sum().item() for batch in data)
    own_nats, _ = whole_logits_loss(model, data[:2])
    model.llama.set_attention(Dense if window is None else partial(SlidingWindow, window=window))
    exact_nats, exact_count = whole_logits_loss(model, data[:2])
    assert found[f"{stage}/loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found[f"{stage}/ppl"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found[f"{stage}/bpb"] == pytest.approx(nats / math.log(2) / length, rel=1e-5)
    assert found[f"{stage}/loss_exact"] == pytest.approx(exact_nats / exact_count, rel=1e-5)
    assert own_nats != pytest.approx(exact_nats, rel=1e-4)


def test_a_checkpoint_is_evaluated_at_the_step_at_which_the_fit_had_validated_it(tmp_path):
    data = TinyData(batches(6), batches(2))
    trainer = tiny_trainer(tmp_path / "fit", max_steps=6, val_check_interval=2)
    trainer.fit(tiny_model(), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = scalars(trainer)["val/loss"]
    assert [step for step, _ in expected] == [1, 3, 5]
    trainer, model = tiny_trainer(tmp_path / "validate"), tiny_model()
    trainer.validate(model, data, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert scalars(trainer)["val/loss"] == [expected[-1]]
    # A training by the same trainer begins at its first step.
    trainer.fit(tiny_model(), TinyData(batches(4)))
    assert [step for step, _ in scalars(trainer)["train/loss"]] == [0, 1, 2, 3]


def test_no_bytes_no_bits_per_byte_and_no_exact_batches_no_exact_loss(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.validate(tiny_model(exact_val_batches=0), TinyData([], batches(1, packed=False)), verbose=False)
    assert set(scalars(trainer)) == {"val/loss", "val/ppl", "epoch"}


def test_predictions_are_log_likelihoods(tmp_path):
    data = batches(2)
    model = tiny_model()
    trainer = tiny_trainer(tmp_path)
    results = trainer.predict(model, TinyData([], data))
    for batch, result in zip(data, results, strict=True):
        nats, _ = whole_logits_loss(model, [batch])
        assert result["log_likelihood"].shape == batch["labels"].shape
        assert result["log_likelihood"].sum().item() == pytest.approx(-nats, rel=1e-5)
        assert (result["log_likelihood"][batch["labels"] == -100] == 0).all()


def test_what_is_computed_again_is_compiled(monkeypatch):
    """In the other order nothing could be left out of it (parallelize.py)."""
    called = []
    for name in ("recompute_in_backward", "compile_around_attention"):
        monkeypatch.setattr(parallelize, name, lambda *_, name=name, **__: called.append(name))
    tiny_model(recompute="keep_attention", compiled=True)
    assert called == ["recompute_in_backward", "compile_around_attention"]


@pytest.mark.slow
@pytest.mark.parametrize("residual_dtype", ["parameters", "autocast"])
def test_compiled_trains_and_validates_like_plain(tmp_path, residual_dtype):
    torch._dynamo.reset()
    counters.clear()
    found = []
    for compiled in (False, True):
        options = {"recompute": "keep_attention", "residual_dtype": residual_dtype, "loss_chunk": 40}
        L.seed_everything(1, verbose=False)
        trainer = tiny_trainer(tmp_path / str(compiled), precision="bf16-mixed", val_check_interval=2)
        trainer.fit(tiny_model(compiled=compiled, **options), TinyData(batches(4), batches(1)))
        logged = scalars(trainer)
        found.append([value for tag in ("train/loss", "val/loss") for _, value in logged[tag]])
    assert len(found[0]) == 4 + 2
    # bf16 rounds elsewhere where operations are fused.
    assert found[1] == pytest.approx(found[0], rel=2**-8)
    # Before and after attention and the loss, each with gradients and without; the loss of the last chunk, 16 of 40.
    assert counters["stats"]["unique_graphs"] <= 2 * 2 + 2 * 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("residual_dtype", ["parameters", "autocast"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(tmp_path, precision, residual_dtype):
    trainer = tiny_trainer(tmp_path, max_steps=6, precision=precision, gradient_clip_val=1.0)
    model = tiny_model(attention=tiny_muse, residual_dtype=residual_dtype)
    stream = set()
    model.llama.model.norm.register_forward_pre_hook(lambda _, args: stream.add(args[0].dtype))
    data = batches(1) * 6
    trainer.fit(model, TinyData(data, data[:1]))
    assert stream == {torch.float32 if (precision, residual_dtype) == ("bf16-mixed", "parameters") else torch.bfloat16}
    found = losses(trainer)
    assert model.llama.lm_head.weight.dtype == (torch.float32 if precision == "bf16-mixed" else torch.bfloat16)
    assert all(map(math.isfinite, found))
    assert found[-1] < found[0]


def test_optimizer_is_fused_with_two_groups(tmp_path):
    model = tiny_model(weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(model, TinyData(batches(1)))
    [optimizer] = trainer.optimizers
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["fused"] and g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in optimizer.param_groups)


def checkpointed(tmp_path, model, steps=4, **options):
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2)
    trainer = tiny_trainer(tmp_path, max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint], **options)
    trainer.fit(model, TinyData(batches(8)))
    return trainer


def test_a_checkpoint_stores_no_hyperparameters_and_hugging_face_names(tmp_path):
    checkpointed(tmp_path, tiny_model())
    checkpoint = torch.load(tmp_path / "epoch=0-step=2.ckpt", weights_only=True)
    assert "hyper_parameters" not in checkpoint
    assert all(name.startswith(("llama.model.", "llama.lm_head.")) for name in checkpoint["state_dict"])
    assert "llama.model.layers.0.self_attn.q_proj.weight" in checkpoint["state_dict"]
    assert checkpoint["tokens_seen"] == 2 * 2 * SEQ_LEN


@pytest.mark.parametrize(
    "attention",
    [
        Dense,
        tiny_muse,
        lambda layer: SpatialBlocks(layer, chunk=16, query_cluster=4, key_cluster=4, top_k=1, exact_below=0),
        lambda layer: SlidingWindow(layer, window=8),
    ],
    ids=["dense", "muse", "spatial", "window"],
)
def test_a_checkpoint_of_dense_continues_with_any_strategy(tmp_path, attention):
    checkpointed(tmp_path / "dense", tiny_model())
    model = tiny_model(attention=attention)
    trainer = tiny_trainer(tmp_path / "next", max_steps=6)
    trainer.fit(model, TinyData(batches(8)), ckpt_path=tmp_path / "dense" / "epoch=0-step=4.ckpt")
    assert [step for step, _ in scalars(trainer)["train/loss"]] == [4, 5]
    assert scalars(trainer)["train/tokens"][-1][1] == 6 * 2 * SEQ_LEN


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_equals_an_uninterrupted_run(tmp_path, optimizer):
    options = {"optimizer": optimizer, "learning_rate": 3e-3, "warmup_steps": 3}
    whole_model, model = tiny_model(**options), tiny_model(**options)
    whole = checkpointed(tmp_path / "whole", whole_model, steps=8)
    rest = tiny_trainer(tmp_path / "rest", max_steps=8)
    rest.fit(model, TinyData(batches(8)), ckpt_path=tmp_path / "whole" / "epoch=0-step=4.ckpt")
    assert losses(rest) == losses(whole)[4:]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole_model.parameters(), strict=True))


@pytest.mark.parametrize(("found", "wanted"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_checkpoint_of_the_other_optimizer(tmp_path, found, wanted):
    checkpointed(tmp_path, tiny_model(optimizer=found))
    path = tmp_path / "epoch=0-step=4.ckpt"
    model = tiny_model(optimizer=wanted)
    with pytest.raises(UserError) as error:
        tiny_trainer(tmp_path).fit(model, TinyData(batches(1)), ckpt_path=path)
    assert str(error.value) == (
        f"model.optimizer is {wanted}, and checkpoint {path} was trained with {found}; accepted: {found}, "
        f"or model.weights: {path} in place of the checkpoint, which starts anew from its weights"
    )
    tiny_trainer(tmp_path).validate(model, TinyData([], batches(1)), ckpt_path=path, verbose=False)


def test_the_recipe_wins_over_the_checkpoint(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(module, "rank_zero_info", printed.append)
    checkpointed(tmp_path / "old", tiny_model(learning_rate=1e-2))
    trainer = tiny_trainer(tmp_path / "new", max_steps=8, callbacks=[LearningRateMonitor("step")])
    model = tiny_model(learning_rate=1e-4, weight_decay=0.0, schedule="wsd", decay_fraction=0.0)
    trainer.fit(model, TinyData(batches(8)), ckpt_path=tmp_path / "old" / "epoch=0-step=4.ckpt")
    rates = [rate for _, rate in scalars(trainer)["lr-AdamW/pg1"]]
    assert rates == pytest.approx([1e-4] * 4)
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.0, 0.0]
    assert printed == [
        "model.learning_rate: 0.01 in the checkpoint, 0.0001 in this recipe, which wins",
        "model.weight_decay: 0.1 in the checkpoint, 0.0 in this recipe, which wins",
    ]


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_checkpoint_of_another_shape(tmp_path, verb):
    checkpointed(tmp_path, tiny_model(config={"intermediate_size": 64}))
    path = tmp_path / "epoch=0-step=4.ckpt"
    with pytest.raises(UserError) as error:
        getattr(tiny_trainer(tmp_path), verb)(tiny_model(), TinyData(batches(1), batches(1)), ckpt_path=path)
    assert str(error.value) == (
        f"checkpoint {path} is of another shape: llama.model.layers.0.mlp.gate_proj.weight is 64x16 there, "
        "32x16 in this recipe"
    )


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_weights_are_loaded_before_step_0(tmp_path, verb):
    trained = tiny_model()
    checkpointed(tmp_path, trained)
    # A step too small to see.
    model = tiny_model(weights=tmp_path / "epoch=0-step=4.ckpt", learning_rate=1e-12)
    data = TinyData(batches(1), [] if verb == "fit" else batches(1))
    getattr(tiny_trainer(tmp_path / "next", max_steps=1), verb)(model, data)
    torch.testing.assert_close(list(model.parameters()), list(trained.parameters()), atol=1e-8, rtol=0)


def test_weights_are_not_loaded_at_a_resume(tmp_path):
    checkpointed(tmp_path, tiny_model())
    trainer = tiny_trainer(tmp_path / "resumed", max_steps=6)
    model = tiny_model(weights=tmp_path / "gone.ckpt")
    trainer.fit(model, TinyData(batches(8)), ckpt_path=tmp_path / "epoch=0-step=4.ckpt")
    assert trainer.global_step == 6


def test_max_steps_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"trainer.max_steps is -1; .* at least 1"):
        tiny_trainer(tmp_path, max_steps=-1, max_epochs=1).fit(tiny_model(), TinyData(batches(1)))


def test_what_trades_time_for_memory_reaches_the_blocks():
    """By calls: attention of every second block twice, its projections over three tiles twice."""
    model = tiny_model(config={"num_hidden_layers": 3}, recompute="block", recompute_every=2, mlp_tiles=3)
    model.configure_model()
    attention, projections = [], []
    for layer, block in enumerate(model.llama.blocks):
        block.self_attn.attention.register_forward_hook(lambda *_, layer=layer: attention.append(layer))
        block.mlp.up_proj.register_forward_hook(lambda *_: projections.append(1))
    model.total_nats(batches(1)[0]).backward()
    assert attention == [0, 1, 2, 2, 0]
    assert len(projections) == 3 * 3 * 2


def test_an_error_at_set_up_is_not_hidden_by_the_tear_down(tmp_path):
    class NoData(TinyData):
        def setup(self, stage):
            raise LookupError("no data")

    with pytest.raises(LookupError, match="no data"):
        tiny_trainer(tmp_path).fit(tiny_model(), NoData([]))
