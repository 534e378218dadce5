"""What is computed again in the backward pass changes memory, and nothing else."""

from functools import partial

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import AttentionStrategy, Dense, Muse
from muse_lightning.model.config import LlamaConfig
from muse_lightning.model.llama import Llama
from muse_lightning.parallelize import Recompute, recompute_in_backward

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
MUSE = partial(Muse, chunk=16, query_cluster=4, key_cluster=4, top_k=1, exact_below=0)


def train_step(policy: Recompute, attention: type[AttentionStrategy]) -> tuple[dict[str, Tensor], int]:
    """Gradients of one step, and the number of elements kept for the backward pass."""
    torch.manual_seed(0)
    llama = Llama(CONFIG, attention)
    recompute_in_backward(llama, policy)
    kept = 0

    def keep(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = llama(torch.randint(64, (1, 100)), cu_seqlens=torch.tensor([0, 60, 100], dtype=torch.int32))
    logits.square().sum().backward()
    return {name: p.grad for name, p in llama.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("attention", [Dense, MUSE], ids=["Dense", "Muse"])
def test_gradients_are_equal_and_less_is_kept(attention: type[AttentionStrategy]) -> None:
    plain, kept_by_plain = train_step("none", attention)
    again, kept = train_step("block", attention)
    assert plain.keys() == again.keys()
    assert len(plain) > 20
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
    assert kept < kept_by_plain / 3


def test_the_state_dict_is_the_same() -> None:
    llama = Llama(CONFIG, Dense)
    names = list(llama.state_dict())
    recompute_in_backward(llama, "block")
    assert list(llama.state_dict()) == names
