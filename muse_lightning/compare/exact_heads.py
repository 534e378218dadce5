"""Which heads attend exactly in the settings that have some that do: chosen as before the first step of a training."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from muse_lightning.attention.partly_exact import choose_heads, exact_heads_in, spread_heads
from muse_lightning.compare.settings import Setting
from muse_lightning.data.batches import Batch, to_device
from muse_lightning.measure.attention_error import errors_by_head, partly_exact
from muse_lightning.model.llama import Llama


def with_chosen_heads(llama: Llama, batch: Batch, settings: Sequence[Setting]) -> list[Setting]:
    """The settings, with the exact heads that they ask for, those whose error adds most in each of them.

    A setting's heads depend on nothing but itself: errors are measured as the callback `ExactHeads` does before the
    first step, while as many heads attend exactly as `spread_heads` has them.

    Args:
        llama: the model, on the device that it shall run on.
        batch: on any device.
    """
    return [_chosen(llama, batch, setting) if setting.exact_heads else setting for setting in settings]


def _chosen(llama: Llama, batch: Batch, setting: Setting) -> Setting:
    config = llama.config
    exact_in_heads = partial(
        exact_heads_in,
        attention=setting.attention,
        num_kv_heads=config.num_key_value_heads,
        window=config.sliding_window,
    )
    spread = spread_heads(
        setting.exact_heads,
        exact_layers=setting.exact_layer_numbers(config.num_hidden_layers),
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
    )
    moved = to_device(batch, llama.lm_head.weight.device)
    with llama.attention_as(exact_in_heads(spread)):
        strategies = partly_exact(llama)
        choose_heads(strategies, errors_by_head(llama, moved["input_ids"], moved.get("cu_seqlens")))
    heads = {strategy.layer_idx: strategy.heads for strategy in strategies}
    elsewhere = setting.elsewhere or setting.attention
    return replace(setting, attention=exact_in_heads(heads), heads=heads, elsewhere=elsewhere)
