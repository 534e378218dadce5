"""What a setting costs: counted query-key pairs, and on a GPU measured time."""

from collections.abc import Callable, Sequence

import torch

from muse_lightning.compare.activations import Activations
from muse_lightning.compare.settings import Setting
from muse_lightning.data.batches import Batch, document_lengths, to_device
from muse_lightning.measure.bench.timing import Instruments, Timing
from muse_lightning.model.llama import Llama


def pairs(setting: Setting, batches: Sequence[Batch], num_layers: int) -> float:
    """A third of the query-key pairs per head that training on these batches would work on, in all layers."""
    strategies = [setting.attention(layer) for layer in range(num_layers)]
    total = 0.0
    for batch in batches:
        rows, seq_len = batch["input_ids"].shape
        lengths = document_lengths(rows, seq_len, batch.get("cu_seqlens"))
        total += sum(strategy.pairs(lengths, has_documents="cu_seqlens" in batch) for strategy in strategies)
    return total


def attention_times(
    settings: Sequence[Setting], found: Activations, instruments: Instruments, num_layers: int
) -> dict[str, float]:
    """Milliseconds of the forward and backward pass of one layer's attention on its q, k and v, by setting; where some
    layers are exact, on average. Exact attention comes first."""
    dout = torch.randn_like(found.out)
    leaves = [x.detach().requires_grad_() for x in (found.q, found.k, found.v)]

    def run_of(setting: Setting) -> Callable[[], object]:
        strategy = (setting.elsewhere or setting.attention)(found.layer)
        return lambda: torch.autograd.grad(strategy(*leaves, **found.options), leaves, dout)

    with torch.enable_grad():
        times = instruments.time({setting.name: run_of(setting) for setting in settings})
    exact = times[settings[0].name].median_ms
    shares = {each.name: len({n % num_layers for n in each.exact_layers}) / num_layers for each in settings}
    return {name: share * exact + (1 - share) * times[name].median_ms for name, share in shares.items()}


def forward_times(
    llama: Llama, settings: Sequence[Setting], batch: Batch, instruments: Instruments
) -> dict[str, Timing]:
    """Forward pass of the whole model without its head, by setting."""
    moved = to_device(batch, llama.lm_head.weight.device)

    def run_of(setting: Setting) -> Callable[[], object]:
        def run() -> None:
            with llama.attention_as(setting.attention), torch.no_grad():
                llama.hidden_states(moved["input_ids"], cu_seqlens=moved.get("cu_seqlens"))

        return run

    return instruments.time({setting.name: run_of(setting) for setting in settings})
