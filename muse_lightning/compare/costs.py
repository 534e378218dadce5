"""What a setting costs: counted query-key pairs, and on a GPU measured time."""

from collections.abc import Callable, Sequence

import torch

from muse_lightning.attention.partly_exact import PartlyExact
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
    """Milliseconds of the forward and backward pass of one layer's attention on its q, k and v, by setting.

    Where layers differ, that is the mean over all of them, each timed on these q, k and v with as many heads exact as
    it has, the first ones. Exact attention comes first.
    """
    num_kv_heads = found.k.shape[1]
    exact = settings[0]
    by_layer = {each.name: _exact_heads_by_layer(each, num_layers, num_kv_heads) for each in settings}
    dout = torch.randn_like(found.out)
    leaves = [x.detach().requires_grad_() for x in (found.q, found.k, found.v)]

    def run_of(setting: Setting, count: int) -> Callable[[], object]:
        others = (setting.elsewhere or setting.attention)(found.layer)
        strategy = PartlyExact(others, exact.attention(found.layer), num_kv_heads, range(count))
        return lambda: torch.autograd.grad(strategy(*leaves, **found.options), leaves, dout)

    def name_of(setting: Setting, count: int) -> str:
        return f"{exact.name}, 0" if count == num_kv_heads else f"{setting.name}, {count}"

    runs = {
        name_of(setting, count): run_of(setting, count)
        for setting in settings
        for count in sorted(set(by_layer[setting.name]))
        if count < num_kv_heads
    }
    with torch.enable_grad():
        times = instruments.time(runs)
    return {
        each.name: sum(times[name_of(each, count)].median_ms for count in by_layer[each.name]) / num_layers
        for each in settings
    }


def _exact_heads_by_layer(setting: Setting, num_layers: int, num_kv_heads: int) -> list[int]:
    exact_layers = setting.exact_layer_numbers(num_layers)
    return [num_kv_heads if layer in exact_layers else len(setting.heads.get(layer, ())) for layer in range(num_layers)]


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
