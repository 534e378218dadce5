"""What each head's approximation alone costs the loss, beside what could foretell it; and what choices of heads leave.

Usage: python tools/head_rise.py MODEL DATA OUT.json [--seq_len 32768] [--blocks 8] [--exact_layers 0 -1]
    [--counts 4 8] [--muse '{top_k: 24}']

MODEL is a run, a checkpoint or a Hugging Face folder, DATA a prepared dataset: --blocks rows of --seq_len tokens,
spread evenly over its validation split, in which documents are not told apart. MuSe takes the place of exact attention
in one key-value head after the other, with the query heads that share it: the rise of the loss, in nats a token. Its
options are MuSe's defaults but for --muse, whatever the run was trained with. What could foretell the rise is measured
once, with every head exact:

    relative    relative squared error of the head's outputs
    of layer    squared norm of what the error adds to the residual stream, over that of what all heads there add: what
                the callback ExactHeads chooses by
    of stream   the same over that of the residual stream behind them
    gradient    sum of (MuSe - exact) . gradient of the loss: the rise to first order

The heads that are largest by each of them, or by the rise itself, are then left exact, as many as --counts names
(default: 4 and 8, where there are more), beside all heads of --exact_layers (default: none; -1 is the last), and all
others approximated. A line for each choice says how far the loss is above that of exact attention, the standard error
over blocks, and how many heads of each layer are exact: "[2, 1, 0] exact" is two in layer 0, one in layer 1, no other.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from muse_lightning.attention import Dense, Muse, layer_numbers
from muse_lightning.attention.partly_exact import PartlyExact, beyond_rounding
from muse_lightning.compare.blocks import Blocks, read_blocks
from muse_lightning.data.batches import IGNORED_LABEL, Batch
from muse_lightning.errors import UserError, one_line
from muse_lightning.measure.attention_error import squares_added
from muse_lightning.model.llama import Llama
from muse_lightning.pretrained.reference import ModelReference, open_model
from muse_lightning.training.loss import next_token_nats, total_nats

LOSS_CHUNK = 4096


class Heads:
    """A model of which any heads may be exact, and the batches that it is evaluated on."""

    def __init__(self, llama: Llama, batches: Sequence[Batch], muse: dict[str, Any]) -> None:
        self.llama, self.batches = llama, batches
        self.shape = (llama.config.num_hidden_layers, llama.config.num_key_value_heads)
        everything = tuple(range(self.shape[1]))
        self.strategies = [
            PartlyExact(Muse(layer, **muse), Dense(layer), self.shape[1], everything) for layer in range(self.shape[0])
        ]
        llama.set_attention(lambda layer: self.strategies[layer])

    def nats(self, is_exact: Tensor) -> Tensor:
        """Mean loss of each batch, float64, where `is_exact`, bool [layers, kv_heads], says which heads are."""
        for strategy, heads in zip(self.strategies, is_exact.tolist(), strict=True):
            strategy.heads = tuple(head for head, exact in enumerate(heads) if exact)
        found = []
        for batch in self.batches:
            with torch.no_grad():
                hidden = self.llama.hidden_states(batch["input_ids"])
            nats = next_token_nats(hidden, self.llama.lm_head.weight, batch["labels"], chunk=LOSS_CHUNK)
            found.append(nats.double().sum() / (batch["labels"] != IGNORED_LABEL).sum())
        return torch.stack(found).cpu()

    def foretold(self) -> dict[str, Tensor]:
        """Each measure of the module's docstring, float64 [layers, kv_heads], mean over batches."""
        for strategy in self.strategies:
            strategy.heads = tuple(range(self.shape[1]))
        found = [self._of_batch(batch) for batch in self.batches]
        return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}

    def _of_batch(self, batch: Batch) -> dict[str, Tensor]:
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        streams: list[float] = []

        def keep(strategy: PartlyExact, inputs: tuple[Tensor, ...], options: dict[str, Any], out: Tensor) -> None:
            with torch.no_grad():
                seen[strategy.layer_idx] = strategy.others(*inputs, **options) - out, out
            out.retain_grad()

        def keep_stream(_: Any, inputs: tuple[Tensor, ...]) -> None:
            streams.append(inputs[0].detach().float().square().sum().item())

        labels = batch["labels"]
        with ExitStack() as hooks:
            for block in self.llama.blocks:
                hooks.enter_context(block.post_attention_layernorm.register_forward_pre_hook(keep_stream))
            for strategy in self.strategies:
                hooks.enter_context(strategy.register_forward_hook(keep, with_kwargs=True))
            hidden = self.llama.hidden_states(batch["input_ids"])
        loss = total_nats(hidden, self.llama.lm_head.weight, labels, chunk=LOSS_CHUNK)
        (loss / (labels != IGNORED_LABEL).sum()).backward()
        self.llama.zero_grad()
        names = ("relative", "of layer", "of stream", "gradient")
        found = {name: torch.zeros(self.shape, dtype=torch.float64) for name in names}
        for layer, (error, out) in seen.items():
            attention = self.llama.blocks[layer].self_attn
            with torch.no_grad():
                lost = squares_added(attention, error, self.shape[1])
                found["of layer"][layer] = lost / squares_added(attention, out, 1)
            found["of stream"][layer] = lost / streams[layer]
            assert out.grad is not None
            per_head = [x.chunk(self.shape[1], 1) for x in (error, out.detach(), out.grad)]
            for head, (wrong, right, gradient) in enumerate(zip(*per_head, strict=True)):
                found["relative"][layer, head] = wrong.float().square().sum() / right.float().square().sum()
                found["gradient"][layer, head] = (wrong.float() * gradient.float()).sum()
        return found

    def rises(self, base: Tensor) -> Tensor:
        """By how much the loss is above `base` where one head alone is approximated, float64 [layers, kv_heads]."""
        found = torch.zeros(self.shape, dtype=torch.float64)
        for layer, head in torch.ones(self.shape).nonzero().tolist():
            is_exact = torch.ones(self.shape, dtype=torch.bool)
            is_exact[layer, head] = False
            found[layer, head] = (self.nats(is_exact) - base).mean()
        return found


def muse_options(text: str) -> dict[str, Any]:
    """MuSe's options, from YAML, as `--muse` has them."""
    try:
        options = yaml.safe_load(text)
        if not isinstance(options, dict):
            raise UserError(f"{text!r} found; a mapping expected, such as {{top_k: 24}}")
        Muse(0, **options)
    except (UserError, TypeError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(one_line(str(error))) from None
    return options


def make_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seq_len", type=int, default=32768)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--exact_layers", type=int, nargs="*", default=[])
    parser.add_argument("--counts", type=int, nargs="+")
    parser.add_argument("--muse", type=muse_options, default={}, help="its options, as YAML")
    return parser


def open_checked(options: argparse.Namespace) -> tuple[ModelReference, Blocks]:
    """What is measured. Leaves in `options` the numbers of layers from 0, and counts where none are given.

    Raises:
        UserError: an argument that cannot be used, before the weights are read.
    """
    for name in ("seq_len", "blocks"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; accepted: at least 1")
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise UserError(f"OUT: {options.out} found; expected a file in a folder that is there")
    reference = open_model(options.model)
    config = reference.config
    options.exact_layers = sorted(layer_numbers(options.exact_layers, config.num_hidden_layers, "--exact_layers"))
    others = (config.num_hidden_layers - len(options.exact_layers)) * config.num_key_value_heads
    if not others:
        raise UserError("--exact_layers names every layer; at least one must be left")
    if options.counts is None:
        options.counts = [count for count in (4, 8) if count < others]
    for count in options.counts:
        if not 1 <= count <= others:
            raise UserError(f"--counts has {count}; accepted: 1 to {others}, the heads outside the exact layers")
    return reference, read_blocks(options.data, "val", options.seq_len, options.blocks, False, config.vocab_size)


def make_choices(measures: dict[str, Tensor], counts: Sequence[int], exact_layers: Sequence[int]) -> dict[str, Tensor]:
    """Which heads to leave exact, bool [layers, kv_heads], by a name: none, those of the first and the last layer, and
    those that are largest by each measure beside those of `exact_layers`."""
    none = torch.zeros_like(measures["rise"], dtype=torch.bool)
    ends = none.clone()
    ends[[0, -1]] = True
    choices = {"none": none, "first and last layer": ends}
    for count in counts:
        for name, values in measures.items():
            values = values.clone()
            values[exact_layers] = -torch.inf
            chosen = none.clone()
            chosen.view(-1)[values.flatten().topk(count).indices] = True
            chosen[exact_layers] = True
            choices[f"{count} by {name}"] = chosen
    return choices


def print_agreement(measures: dict[str, Tensor]) -> None:
    """How well each measure foretells the rise, and its values, where attention errs at all."""
    if not beyond_rounding(measures["of layer"]).any():
        print("no head errs: MuSe attends these blocks exactly (exact_below), and nothing can be told of heads")
        return
    rise = measures["rise"].flatten()
    for name, values in measures.items():
        agreement = torch.corrcoef(torch.stack([values.flatten(), rise]))[0, 1].item()
        print(f"{name}: correlation with the rise {agreement:.3f}\n{values.numpy().round(5)}")


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = make_parser()
    options = parser.parse_args(args)
    try:
        reference, read = open_checked(options)
    except UserError as error:
        parser.error(one_line(str(error)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llama = reference.load(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    batches: list[Batch] = [
        {"input_ids": batch["input_ids"].to(device), "labels": batch["labels"].to(device)} for batch in read.batches
    ]
    heads = Heads(llama, batches, options.muse)
    base = heads.nats(torch.ones(heads.shape, dtype=torch.bool))
    measures = heads.foretold() | {"rise": heads.rises(base)}
    left = {}
    for name, is_exact in make_choices(measures, options.counts, options.exact_layers).items():
        rise = heads.nats(is_exact) - base
        error = rise.std().item() / len(rise) ** 0.5 if len(rise) > 1 else None
        left[name] = {"rise": rise.mean().item(), "standard_error": error, "exact": is_exact.int().tolist()}
        spread = "" if error is None else f" ± {error:.5f}"
        print(f"{name:28s} {rise.mean():+.5f}{spread}  {is_exact.sum(1).tolist()} exact", flush=True)
    print_agreement(measures)
    record = {
        "model": str(options.model),
        "seq_len": options.seq_len,
        "blocks": list(read.indices),
        "muse": options.muse,
        "exact_layers": options.exact_layers,
        "loss": base.mean().item(),
        "heads": {name: values.tolist() for name, values in measures.items()},
        "choices": left,
    }
    options.out.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
