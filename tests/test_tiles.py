"""A function in tiles against the function at once: results, gradients, memory, what it runs under."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muse_lightning.tiles import in_tiles
from tests.tiny import LargestTensor

TOKENS, WIDTH, INSIDE = 60, 8, 1024


@pytest.fixture
def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, INSIDE), nn.SiLU(), nn.Linear(INSIDE, WIDTH))


def gradients(function: nn.Module, x: Tensor, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.float().square().sum(), [x, *function.parameters()]))


@pytest.mark.parametrize("tiles", [1, 4, 7, 100])
def test_results_and_gradients(network: nn.Sequential, tiles: int) -> None:
    network.double()
    x = torch.randn(2, TOKENS // 2, WIDTH, dtype=torch.float64, requires_grad=True)
    out = in_tiles(network, tiles, list(network.parameters()), x)
    assert torch.allclose(out, network(x), rtol=1e-13)
    for found, expected in zip(gradients(network, x, out), gradients(network, x, network(x)), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12)


def test_the_result_is_no_view(network: nn.Sequential) -> None:
    """Of which FSDP2 would warn."""
    out = in_tiles(network, 3, list(network.parameters()), torch.randn(2, 7, 8, requires_grad=True))
    assert (out.shape, out.is_contiguous(), out._is_view()) == ((2, 7, 8), True, False)


def test_what_lies_inside_exists_for_one_tile_at_a_time(network: nn.Sequential) -> None:
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with LargestTensor() as largest:
        gradients(network, x, in_tiles(network, 6, list(network.parameters()), x))
    assert largest.elements == max(TOKENS // 6 * INSIDE, INSIDE * WIDTH)


def test_no_more_than_the_input_is_kept(network: nn.Sequential) -> None:
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        in_tiles(network, 6, list(network.parameters()), x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_gradients_are_summed_in_the_parameters_precision(network: nn.Sequential) -> None:
    """Under autocast a tile's products are bfloat16. Their sum is float32 and no worse than that of one product."""
    dtypes = set()
    network[0].register_forward_hook(lambda _, inputs, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(TOKENS, WIDTH, requires_grad=True)
        exact = gradients(network.double(), x, network(x.double()).float())
        network.float()
        dtypes.clear()
        at_once = gradients(network, x, network(x))
        out = in_tiles(network, 6, list(network.parameters()), x)
    tiled = gradients(network, x, out)  # outside autocast, as the backward pass of a training step
    assert dtypes == {torch.bfloat16}
    for reference, whole, found in zip(exact, at_once, tiled, strict=True):
        assert found.dtype == torch.float32
        assert (found - reference).norm() < 1.5 * (whole - reference).norm() + 1e-3 * reference.norm()


def test_frozen_parameters_and_inputs(network: nn.Sequential) -> None:
    network[0].weight.requires_grad_(False)
    x = torch.randn(TOKENS, WIDTH)
    in_tiles(network, 4, list(network.parameters()), x).square().sum().backward()
    assert network[0].weight.grad is None
    found = network[2].weight.grad.clone()
    network.zero_grad()
    network(x).square().sum().backward()
    assert torch.allclose(found, network[2].weight.grad, rtol=1e-4, atol=1e-5)


def test_without_gradients_nothing_is_kept(network: nn.Sequential) -> None:
    with torch.no_grad():
        out = in_tiles(network, 4, list(network.parameters()), torch.randn(TOKENS, WIDTH, requires_grad=True))
    assert out.grad_fn is None


def test_inside_a_checkpoint_it_is_computed_twice_and_no_more(network: nn.Sequential) -> None:
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)

    def around(y: Tensor) -> Tensor:
        return in_tiles(network, 4, list(network.parameters()), F.silu(y))

    out = checkpoint(around, x, use_reentrant=False)
    assert len(calls) == 4
    found = gradients(network, x, out)
    assert len(calls) == 8
    for gradient, expected in zip(found, gradients(network, x, network(F.silu(x))), strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
