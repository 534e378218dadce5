"""The estimate of memory against what autograd really keeps."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from muse_lightning.attention import AttentionStrategy, Dense, Muse
from muse_lightning.measure.memory import step_memory
from muse_lightning.model import Llama, load_preset
from muse_lightning.parallelize import Recompute


def far_muse(layer: int) -> AttentionStrategy:
    return Muse(layer, chunk=64, query_cluster=16, key_cluster=16, exact_below=64)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16-mixed"])
@pytest.mark.parametrize("attention", [Dense, far_muse], ids=["dense", "muse"])
def test_recomputed_blocks_keep_their_inputs_and_the_inside_of_one(
    attention: type[AttentionStrategy], autocast: torch.dtype | None
) -> None:
    """Against the definition: per-layer growth is one input of a block, and the rest is one block's inside."""

    def activations(num_layers: int, recompute: Recompute) -> int:
        config = load_preset("demo", num_hidden_layers=num_layers)
        sizes = {"batch_size": 2, "seq_len": 256, "loss_chunk": 128}
        return step_memory(config, attention, **sizes, recompute=recompute, autocast=autocast).activations

    hidden = 2 * 256 * load_preset("demo").hidden_size * 4  # the residual stream is float32
    assert activations(3, "block") - activations(2, "block") == hidden
    inside = activations(3, "none") - activations(2, "none")
    # The block's input, its output, what the final norm keeps, and its output; then angles and token ids.
    assert 0 <= activations(1, "block") - inside - 4 * hidden < hidden


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16-mixed"])
@pytest.mark.parametrize("attention", [Dense, far_muse], ids=["dense", "muse"])
@pytest.mark.parametrize("qwen", [False, True], ids=["llama", "biases-qk_norm"])
def test_activations_are_what_autograd_keeps(
    attention: type[AttentionStrategy], autocast: torch.dtype | None, qwen: bool
) -> None:
    config = load_preset("demo", num_hidden_layers=2, attention_bias=qwen, mlp_bias=qwen, qk_norm=qwen)
    memory = step_memory(config, attention, batch_size=2, seq_len=256, loss_chunk=128, autocast=autocast)

    llama = Llama(config, attention)
    llama.init_weights()
    weights = {parameter.data_ptr() for parameter in llama.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    input_ids = torch.randint(256, (2, 256))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", autocast) if autocast else nullcontext(),
    ):
        hidden = llama.hidden_states(input_ids)
    kept[hidden.untyped_storage().data_ptr()] = hidden
    assert memory.activations == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_weights_gradients_and_moments() -> None:
    config = load_preset("demo")
    count = sum(parameter.numel() for parameter in Llama(config, Dense).parameters())
    sizes = {"batch_size": 1, "seq_len": 64, "loss_chunk": 16}
    single = step_memory(config, Dense, **sizes, autocast=None)
    assert (single.parameters, single.gradients, single.optimizer) == (4 * count, 4 * count, 8 * count)
    assert single.loss == 16 * config.vocab_size * 2 * 4
    half = step_memory(config, Dense, **sizes, dtype=torch.bfloat16, autocast=None)
    assert (half.parameters, half.gradients, half.optimizer) == (2 * count, 2 * count, 4 * count)
    assert single.total == single.parameters * 4 + single.activations + single.loss
    assert torch.get_default_dtype() == torch.float32


def test_a_large_model_takes_no_memory_to_estimate() -> None:
    memory = step_memory(load_preset("8b"), Muse, batch_size=1, seq_len=65536, loss_chunk=2048, autocast=torch.bfloat16)
    assert memory.parameters == 8_030_261_248 * 4  # the published number of parameters of Llama 3.1 8B
    assert memory.activations > 100 * 1024**3
