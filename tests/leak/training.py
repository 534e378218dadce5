"""Train a small model on uniformly random tokens, where nothing can be learned, and measure what it has learned.

Tokens are fresh in every step, so that nothing can be remembered either: whoever predicts the next token better than
by log(VOCAB) has seen it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_lightning.attention import AttentionStrategy, Dense, Muse
from muse_lightning.model import LlamaConfig
from muse_lightning.model.llama import Llama
from muse_lightning.training.loss import total_nats

VOCAB = 8
ERRORS = 5.0
"""Standard errors that are no noise any more: less than one in a million by chance."""


@dataclass(frozen=True)
class Setting:
    """A model, its attention, and how long it is trained and measured."""

    muse: dict[str, Any]
    """Options of Muse."""
    seq_len: int
    batch_size: int
    steps: int
    num_layers: int = 2
    num_heads: int = 2
    head_dim: int = 16
    learning_rate: float = 1e-2
    initializer_range: float = 0.2
    """Ten times what is usual: logits of attention then differ from the start, and there is something to find."""
    eval_batches: int = 64
    device: str = "cpu"
    precision: torch.dtype = torch.float32
    """Of autocast."""

    def attention(self, layer: int) -> AttentionStrategy:
        """What is trained."""
        return Muse(layer, **self.muse)


class Measured(NamedTuple):
    """A mean over fresh tokens, and its standard error.

    Given the tokens before, what a model without a leak says of the next one is independent of it: the terms are
    differences of a martingale, whose mean has the standard error of independent ones.
    """

    mean: float
    error: float

    @property
    def errors(self) -> float:
        """The mean in standard errors."""
        return self.mean / self.error

    def __str__(self) -> str:
        return f"{self.mean:+.5f} +- {self.error:.5f} ({self.errors:+.1f} errors)"


class Result(NamedTuple):
    """What a model knows of tokens that it cannot know."""

    excess: Measured
    """Loss minus log(VOCAB), nats. Below 0 there is a leak; above 0 the model believes in noise."""
    advantage: Measured
    """Logit of the next token minus the mean logit: of mean 0 without a leak, whatever noise the model believes in."""

    @property
    def leaks(self) -> bool:
        """Whether the loss is below log(VOCAB) by more than noise."""
        return self.excess.errors < -ERRORS

    @property
    def is_clean(self) -> bool:
        """Whether neither the loss nor the sharper advantage shows anything."""
        return not self.leaks and self.advantage.errors < ERRORS


def train(setting: Setting, seed: int) -> Llama:
    """A model trained with `setting.attention`."""
    torch.manual_seed(seed)
    hidden_size = setting.num_heads * setting.head_dim
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=setting.num_layers,
        num_attention_heads=setting.num_heads,
        num_key_value_heads=setting.num_heads,
        max_position_embeddings=setting.seq_len,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        initializer_range=setting.initializer_range,
    )
    model = Llama(config, setting.attention)
    model.init_weights()
    model.to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    # To 0 over the second half: what is believed of noise is unlearned.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, 2 * (1 - step / setting.steps))
    )
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(setting.steps):
        input_ids, labels = _batch(setting, generator)
        with torch.autocast(setting.device, setting.precision, enabled=setting.precision != torch.float32):
            hidden = model.hidden_states(input_ids)
            loss = total_nats(hidden, model.lm_head.weight, labels, chunk=labels.numel()) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def evaluate(model: Llama, setting: Setting, attention: Callable[[int], AttentionStrategy], seed: int) -> Result:
    """Measure with some attention on tokens that the training has not had."""
    generator = torch.Generator().manual_seed(seed + 2)
    nats, advantages = [], []
    with model.attention_as(attention):
        for _ in range(setting.eval_batches):
            input_ids, labels = _batch(setting, generator)
            with torch.autocast(setting.device, setting.precision, enabled=setting.precision != torch.float32):
                hidden = model.hidden_states(input_ids)
            logits = F.linear(hidden.float(), model.lm_head.weight.float())
            nats.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
            advantages.append((logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.mean(-1)).flatten())
    return Result(_measured(torch.cat(nats).double() - math.log(VOCAB)), _measured(torch.cat(advantages).double()))


def train_and_evaluate(setting: Setting, seed: int = 0) -> tuple[Result, Result]:
    """Results of one training with the attention it was trained with, and with Dense."""
    model = train(setting, seed)
    return evaluate(model, setting, setting.attention, seed), evaluate(model, setting, Dense, seed)


def _batch(setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (setting.batch_size, setting.seq_len + 1), generator=generator)
    tokens = tokens.to(setting.device)
    return tokens[:, :-1], tokens[:, 1:]


def _measured(values: Tensor) -> Measured:
    return Measured(values.mean().item(), (values.std() / math.sqrt(len(values))).item())
