"""A language model that copies: where the last tokens stood before, it knows what follows; else all is as likely."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from muse_lightning.training.module import LanguageModel
from tests.tiny import tiny_model

CERTAINTY = 30.0
"""The logit of the token that is known; the others' are 0."""


class Oracle(nn.Module):
    """In place of a Llama: final states are logits, the head is the identity.

    Args:
        vocab_size: number of tokens.
        next_token: the tokens of one document up to here -> the next one; None: all are as likely.
    """

    def __init__(self, vocab_size: int, next_token: Callable[[list[int]], int | None]) -> None:
        super().__init__()
        self.lm_head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.next_token = next_token
        self.calls = 0

    def hidden_states(self, input_ids: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        self.calls += 1
        rows, seq_len = input_ids.shape
        starts = set(range(0, rows * seq_len, seq_len) if cu_seqlens is None else cu_seqlens.tolist())
        logits = torch.zeros(rows * seq_len, len(self.lm_head.weight))
        document: list[int] = []
        for place, token in enumerate(input_ids.flatten().tolist()):
            document = [token] if place in starts else [*document, token]
            known = self.next_token(document)
            if known is not None:
                logits[place, known] = CERTAINTY
        return logits.view(rows, seq_len, -1)

    @contextmanager
    def attention_as(self, attention: Any) -> Iterator[None]:
        yield


def copies(suffix: int, memory: int = 1_000_000) -> Callable[[list[int]], int | None]:
    """Looks for the last `suffix` tokens in the last `memory` ones before, and says what followed."""

    def next_token(document: list[int]) -> int | None:
        wanted = document[-suffix:]
        for end in range(len(document) - 1, max(suffix - 1, len(document) - memory), -1):
            if document[end - suffix : end] == wanted:
                return document[end]
        return None

    return next_token


def oracle_model(vocab_size: int, next_token: Callable[[list[int]], int | None]) -> LanguageModel:
    model = tiny_model(config={"vocab_size": vocab_size}, exact_val_batches=0, seq_len=None)
    model.llama = Oracle(vocab_size, next_token)
    return model


def nats_of(vocab_size: int, is_known: bool) -> float:
    """What a token costs under the oracle."""
    return math.log1p((vocab_size - 1) * math.exp(-CERTAINTY)) if is_known else math.log(vocab_size)
