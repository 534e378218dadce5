"""What each head's approximation alone costs the loss, beside what could foretell it; and what choices of heads leave.

Usage: python tools/head_rise.py MODEL DATA OUT.json [--seq_len N] [--blocks N] [--exact_layers 0] [--counts 4 8]
    [--muse '{top_k: 24}']

MODEL is a run or a checkpoint, DATA a prepared dataset. MuSe takes the place of exact attention in one key-value head
after the other, with the query heads that share it: the rise of the loss, in nats a token. What could foretell it is
measured once, with every head exact:

    relative    relative squared error of the head's outputs
    of layer    squared norm of what the error adds to the residual stream, over that of what all heads there add: what
                the callback ExactHeads chooses by
    of stream   the same over that of the residual stream behind them
    gradient    sum of (MuSe - exact) . gradient of the loss: the rise to first order

The heads that are largest by each of them, or by the rise itself, are then left exact, as many as --counts names,
beside all heads of --exact_layers, and all others approximated.
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

from muse_lightning.attention import Dense, Muse
from muse_lightning.attention.partly_exact import PartlyExact
from muse_lightning.compare.blocks import read_blocks
from muse_lightning.data.batches import IGNORED_LABEL, Batch
from muse_lightning.measure.attention_error import squares_added
from muse_lightning.model.llama import Llama
from muse_lightning.pretrained.reference import open_model
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


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seq_len", type=int, default=32768)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--exact_layers", type=int, nargs="*", default=[])
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--muse", type=yaml.safe_load, default={}, help="its options, as YAML")
    options = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = open_model(options.model)
    llama = reference.load(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    read = read_blocks(options.data, "val", options.seq_len, options.blocks, False, reference.config.vocab_size)
    batches: list[Batch] = [
        {"input_ids": batch["input_ids"].to(device), "labels": batch["labels"].to(device)} for batch in read.batches
    ]
    heads = Heads(llama, batches, options.muse)
    base = heads.nats(torch.ones(heads.shape, dtype=torch.bool))
    measures = heads.foretold() | {"rise": heads.rises(base)}
    choices = {"none": torch.zeros(heads.shape, dtype=torch.bool)}
    ends = torch.zeros(heads.shape, dtype=torch.bool)
    ends[0] = ends[-1] = True
    choices["first and last layer"] = ends
    for count in options.counts:
        for name, values in measures.items():
            values = values.clone()
            values[options.exact_layers] = -torch.inf
            chosen = torch.zeros(values.numel(), dtype=torch.bool)
            chosen[values.flatten().topk(count).indices] = True
            choices[f"{count} by {name}"] = chosen.view(heads.shape)
            choices[f"{count} by {name}"][options.exact_layers] = True
    record: dict[str, object] = {
        "model": str(options.model),
        "seq_len": options.seq_len,
        "blocks": list(read.indices),
        "muse": options.muse,
        "exact_layers": options.exact_layers,
        "loss": base.mean().item(),
        "heads": {name: values.tolist() for name, values in measures.items()},
    }
    left = {}
    for name, is_exact in choices.items():
        rise = heads.nats(is_exact) - base
        error = rise.std().item() / len(rise) ** 0.5
        left[name] = {"rise": rise.mean().item(), "standard_error": error, "exact": is_exact.int().tolist()}
        print(f"{name:28s} {rise.mean():+.5f} ± {error:.5f}  {is_exact.sum(1).tolist()} exact", flush=True)
    rise = measures["rise"].flatten()
    for name, values in measures.items():
        agreement = torch.corrcoef(torch.stack([values.flatten(), rise]))[0, 1].item()
        print(f"{name}: correlation with the rise {agreement:.3f}\n{values.numpy().round(5)}")
    options.out.write_text(json.dumps(record | {"choices": left}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
