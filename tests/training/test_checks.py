"""What is refused, and what is said once, before a model is made."""

import warnings

import pytest
from lightning.pytorch.callbacks import Timer

from muse_lightning.attention import AttentionStrategy, Dense, Muse
from muse_lightning.errors import UserError
from muse_lightning.training.checks import check_trainer
from tests.tiny import tiny_model, tiny_trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_size": 33}, "model.config.vocab_size is 32; the tokenizer has 33 ids, so at least 33 are needed"),
        ({"mlp_tiles": 65, "seq_len": 64}, "model.mlp_tiles is 65; accepted: 1 to data.seq_len, 64"),
        ({"seq_len": 65}, "data.seq_len is 65; model.config.max_position_embeddings allows at most 64"),
        ({"learning_rate": 0.0}, "model.learning_rate is 0.0; accepted: above 0"),
        ({"optimizer": "sgd"}, "model.optimizer is 'sgd'; accepted: adamw or muon"),
        ({"momentum": 1.0}, "model.momentum is 1.0; accepted: at least 0 and below 1"),
        ({"betas": (0.9, 1.0)}, "model.betas is (0.9, 1.0); accepted: at least 0 and below 1, both"),
        ({"schedule": "linear"}, "model.schedule is 'linear'; accepted: cosine or wsd"),
        ({"residual_dtype": "bf16"}, "model.residual_dtype is 'bf16'; accepted: parameters or autocast"),
        ({"min_lr_ratio": 1.5}, "model.min_lr_ratio is 1.5; accepted: between 0 and 1"),
        ({"loss_chunk": 0}, "model.loss_chunk is 0; accepted: at least 1"),
        ({"recompute_every": 0}, "model.recompute_every is 0; accepted: at least 1"),
        (
            {"recompute_every": 2},
            "model.recompute_every is 2; accepted with model.recompute block or keep_attention, found none",
        ),
        (
            {"offload": True},
            "model.offload is true; accepted with model.recompute block or keep_attention, found none",
        ),
        ({"mlp_tiles": 0}, "model.mlp_tiles is 0; accepted: at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_at_construction(options, message):
    with pytest.raises(UserError) as error:
        tiny_model(**options)
    assert str(error.value) == message


def test_the_strategy_is_asked_about_the_sizes():
    class Picky(Dense):
        def check(self, **sizes):
            raise UserError(f"not {sizes}")

    with pytest.raises(UserError, match=r"not {'seq_len': 48, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 4}"):
        tiny_model(attention=Picky)
    tiny_model(attention=Picky, seq_len=None)


@pytest.mark.parametrize(("lacks", "has"), [("forward", "pairs"), ("pairs", "forward")])
def test_a_strategy_must_be_whole(lacks: str, has: str) -> None:
    half = type("Half", (AttentionStrategy,), {has: getattr(Dense, has)})
    with pytest.raises(UserError, match=rf"\.Half has no {lacks}\(\): write {lacks}\(self, "):
        tiny_model(attention=half)
    tiny_model(attention=type("Whole", (half,), {lacks: getattr(Dense, lacks)}))


def test_a_warning_keeps_its_category():
    class Old(Dense):
        def check(self, **sizes):
            warnings.warn("old", FutureWarning, stacklevel=2)

    with pytest.warns(FutureWarning, match="old") as warned:
        tiny_model(attention=Old)
    assert len(warned) == 1


@pytest.mark.parametrize("exact_layers", [(), (0,)])
def test_muse_that_is_all_exact_is_allowed_with_one_warning(exact_layers):
    with pytest.warns(UserWarning, match="Muse attends rows without documents exactly at this context") as warned:
        tiny_model(attention=Muse, exact_layers=exact_layers, config={"num_hidden_layers": 3})
    assert len(warned) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1, "fast_dev_run": 3},
        {"val_check_interval": "00:00:10:00"},
        {"val_check_interval": 0.5},
        {"val_check_interval": 0, "limit_val_batches": 0},
        {"val_check_interval": 3, "limit_train_batches": 3},
        {"val_check_interval": 3, "limit_train_batches": 2, "check_val_every_n_epoch": None},
        {"val_check_interval": 3, "limit_train_batches": 0.5},
        {"max_time": "00:00:00:01"},
        {"max_time": {"milliseconds": 1}},
        {"max_time": "00:00:00:00", "callbacks": [Timer()]},
    ],
    ids="-".join,
)
def test_intervals_and_times_that_lightning_takes(tmp_path, options):
    check_trainer(tiny_trainer(tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({"max_time": "00:00:00:00"}, 0),
        ({"max_time": {"hours": -1}}, -3600),
        ({"callbacks": [Timer("00:00:00:00")]}, 0),
    ],
    ids=["none", "below", "callback"],
)
def test_a_time_in_which_nothing_is_trained(tmp_path, options, seconds):
    said = (
        f"^trainer.max_time, or Timer's duration: {seconds} seconds found, no time to train; accepted: above 0, such as"
    )
    with pytest.raises(UserError, match=said):
        check_trainer(tiny_trainer(tmp_path, **options))
