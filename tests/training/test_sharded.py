"""What the sharded strategy refuses; that it trains and resumes, in tests/distributed/ and test_resume.py."""

from pathlib import Path

import pytest

from muse_lightning.errors import UserError
from muse_lightning.training.sharded import ShardedStrategy
from tests.tiny import TinyData, batches, tiny_model, tiny_trainer


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"intermediate_size": 64},
            "is of another shape: llama.model.layers.0.mlp.gate_proj.weight is 64x16 there, 32x16 in this recipe",
        ),
        ({"num_hidden_layers": 3}, "has a tensor llama.model.layers.2.self_attn.q_proj.weight, 16x16, which the model"),
    ],
    ids=["shape", "layers"],
)
def test_a_checkpoint_of_another_architecture(
    config: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a parameter has changed."""
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(tiny_model(config=config), TinyData(batches(1)))
    path = tmp_path / "other.ckpt"
    trainer.save_checkpoint(path)
    strategy = ShardedStrategy()
    monkeypatch.setattr(strategy, "broadcast", lambda value: value)
    strategy._lightning_module = tiny_model()
    with pytest.raises(UserError) as error:
        strategy.load_checkpoint(path, weights_only=True)
    assert str(error.value).startswith(f"checkpoint {path} {message}")
