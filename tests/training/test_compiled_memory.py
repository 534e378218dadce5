"""What compiled functions are said to keep, against what torch.compile's own keep."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from muse_lightning.attention import Dense
from muse_lightning.model import load_preset
from muse_lightning.model.llama import Block
from muse_lightning.training.compiled_memory import AsCompiled
from muse_lightning.training.memory import default_dtype

TOKENS = 96


def block(dtype: torch.dtype) -> Block:
    with default_dtype(dtype):
        return Block(load_preset("demo"), Dense(0))


def arguments(of: Block, name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    config = load_preset("demo")
    x = torch.randn(1, TOKENS, config.hidden_size, dtype=dtype, requires_grad=True)
    angles = torch.randn(1, TOKENS, 16)
    out = torch.randn(1, config.num_attention_heads, TOKENS, 32, dtype=dtype, requires_grad=True)
    return (x, angles.cos(), angles.sin()) if name == "before_attention" else (x, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["before_attention", "after_attention"])
def test_it_keeps_what_the_compiler_keeps(name: str, dtype: torch.dtype) -> None:
    module = block(dtype)
    args = arguments(module, name, dtype)
    compiled = torch.compile(getattr(module, name), fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    result = compiled(*args)
    first = result[0] if isinstance(result, tuple) else result
    others = [tensor.data_ptr() for tensor in (*args, *module.parameters())]
    kept = {
        tensor.data_ptr(): tensor.nbytes
        for tensor in first.grad_fn.saved_tensors
        if tensor.data_ptr() not in others and tensor.numel()
    }
    with FakeTensorMode(allow_non_fake_inputs=False):
        twin = block(dtype)
        plans: dict = {}
        emulated = AsCompiled(getattr(twin, name), plans)(*arguments(twin, name, dtype))
    (plan,) = plans.values()
    assert sum(plan.kept) == sum(kept.values())
    outputs = emulated if isinstance(emulated, tuple) else (emulated,)
    expected = result if isinstance(result, tuple) else (result,)
    assert [(out.shape, out.dtype) for out in outputs] == [(out.shape, out.dtype) for out in expected]


def test_predictions_do_not_use_up_what_the_compiler_keeps_of_a_method() -> None:
    """It refuses more sizes of one method than a limit, of the training too."""
    with FakeTensorMode(allow_non_fake_inputs=False), torch._dynamo.config.patch(recompile_limit=1):
        twin = block(torch.float32)
        after_attention = AsCompiled(twin.after_attention, {})
        config = load_preset("demo")
        for tokens in (16, 32):
            x = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
            after_attention(x, torch.randn(1, config.num_attention_heads, tokens, 32))
