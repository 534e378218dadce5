"""What `muse info` says of a recipe: sizes, attention, work, and memory by part."""

from muse_lightning.attention import Dense, describe_layers
from muse_lightning.measure.flops import training_flops_per_token
from muse_lightning.measure.info import GIB, MIB
from muse_lightning.training.memory import PHASES, step_memory
from muse_lightning.training.module import LanguageModel


def recipe_report(
    model: LanguageModel,
    *,
    batch_size: int,
    seq_len: int,
    accumulate: int,
    precision: str | int | None,
    has_documents: bool,
) -> str:
    """What training a model on one device takes.

    Args:
        model: on the meta device or any other.
        batch_size, seq_len: sequences per device and micro-batch, and their tokens.
        accumulate: micro-batches per step.
        precision: Lightning's name of it.
        has_documents: attention is told where documents are.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = training_flops_per_token(model.llama, [seq_len], has_documents=has_documents)
    dense = training_flops_per_token(model.llama, [seq_len], [Dense(0)])
    tokens = batch_size * seq_len * accumulate
    memory = step_memory(model, batch_size=batch_size, seq_len=seq_len, accumulate=accumulate, precision=precision)
    lines = [
        f"parameters: {parameters:,}",
        f"attention: {describe_layers([block.self_attn.attention for block in model.llama.blocks])}",
        f"tokens per step and device: {tokens:,} = {batch_size} x {seq_len:,} x {accumulate} accumulated",
        f"training FLOPs per token: {flops:.3e} at a context of one document ({dense:.3e} with dense attention)",
        f"memory per GPU: {shown(memory.total)} at the peak, in the {PHASES[memory.phase]}; nothing sharded",
    ]
    return "\n".join([*lines, *(f"  {name}: {shown(size)}" for name, size in memory.parts.items())])


def shown(size: int) -> str:
    """Bytes for a reader."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
