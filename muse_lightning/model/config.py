"""LlamaConfig: every number of the architecture, under Hugging Face's names, so that `config.json` maps one to one."""

import math
from dataclasses import dataclass
from typing import Literal

from muse_lightning.errors import UserError

ROPE_TYPES = ("llama3", "linear", "yarn")
"""Accepted RopeScaling.rope_type."""


@dataclass
class RopeScaling:
    """Extension of the rotary embedding to contexts longer than those it was first trained on.

    `llama3` (Llama 3.1): slow rotations (long wavelengths) are slowed further by `factor`, fast ones kept, those
    between interpolated. `yarn` (arXiv 2309.00071): likewise, with a ramp over the pairs of a head instead of their
    wavelengths, and larger logits. `linear` (arXiv 2306.15595): all rotations are slowed by `factor`.
    """

    factor: float
    """By how much the longest wavelengths are stretched."""

    original_max_position_embeddings: int | None = None
    """Context length, in tokens, of the training that came before the extension. Needed but for `linear`."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are stretched by the full factor."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are kept."""

    rope_type: Literal["llama3", "linear", "yarn"] = "llama3"
    """Name of the scheme in a Hugging Face config."""

    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this over the original context are kept."""

    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this over the original context are stretched by the whole factor."""

    attention_factor: float | None = None
    """yarn: factor of cosine and sine, so that logits grow by its square; 0.1 ln(factor) + 1 when not given."""

    truncate: bool = True
    """yarn: whether the ends of the ramp are rounded outwards to whole pairs."""

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope_scaling.rope_type is {self.rope_type!r}; accepted: {', '.join(ROPE_TYPES)}")
        if self.factor < 1:
            raise UserError(f"rope_scaling.factor is {self.factor}; it must be at least 1")
        if self.rope_type == "linear":
            return
        original = self.original_max_position_embeddings
        if original is None or original < 1:
            raise UserError(f"rope_scaling.original_max_position_embeddings is {original}; it must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor}; it must be above 0 and below "
                f"high_freq_factor, {self.high_freq_factor}"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f"rope_scaling.beta_slow is {self.beta_slow}; it must be above 0 and below beta_fast, {self.beta_fast}"
            )
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise UserError(f"rope_scaling.attention_factor is {self.attention_factor}; it must be above 0")

    @property
    def rotation_factor(self) -> float:
        """What cosine and sine are multiplied with."""
        if self.rope_type != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


@dataclass
class LlamaConfig:
    """Architecture of a Llama-family decoder.

    Raises:
        UserError: a size is not positive or does not divide another; the message names the field.
    """

    vocab_size: int
    """Rows of the embedding and of the head. At least the tokenizer's size; a multiple of 64 is faster on a GPU."""

    hidden_size: int
    """Width of the residual stream. Parameters and time of a layer grow with its square."""

    intermediate_size: int
    """Width inside the feed-forward network; about 8/3 of hidden_size is usual, 4 in Llama 3.2 1B."""

    num_hidden_layers: int
    """Transformer blocks. Parameters, time and activation memory grow with it."""

    num_attention_heads: int
    """Query heads."""

    num_key_value_heads: int
    """Key and value heads, each shared by num_attention_heads / num_key_value_heads query heads."""

    max_position_embeddings: int
    """Longest context, in tokens, the model is meant for. `data.seq_len` may not exceed it; it costs nothing itself."""

    head_dim: int | None = None
    """Size of one head; hidden_size / num_attention_heads when not given."""

    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    rope_theta: float = 500_000.0
    """Base of the rotary wavelengths. Larger bases tell apart positions that are farther away."""

    rope_scaling: RopeScaling | None = None
    """Context extension of the rotary embedding; none when not given."""

    tie_word_embeddings: bool = True
    """Whether the head is the embedding: vocab_size * hidden_size fewer parameters."""

    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""

    attention_bias: bool = False
    """Whether the projections to queries, keys and values have a bias, as in Qwen2."""

    attention_output_bias: bool = False
    """Whether the projection of the attention's output has a bias. Hugging Face's Llama has it with the other three."""

    mlp_bias: bool = False
    """Whether the feed-forward network's projections have a bias."""

    qk_norm: bool = False
    """Whether queries and keys are normalised (RMSNorm over a head, before the rotary embedding), as in Qwen3."""

    sliding_window: int | None = None
    """Tokens in sight of each token when the weights were trained, itself included; null for all. What is called exact
    attention sees as many. The recipe's attention is chosen apart, by `model.attention`."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if getattr(self, name) <= 0:
                raise UserError(f"config.{name} is {getattr(self, name)}; it must be above 0")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"config.sliding_window is {self.sliding_window}; it must be at least 1, or null")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config.num_key_value_heads is {self.num_key_value_heads}; it must divide "
                f"config.num_attention_heads, {self.num_attention_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"config.num_attention_heads is {self.num_attention_heads}; it must divide config.hidden_size, "
                f"{self.hidden_size}, or config.head_dim must be given"
            )
        if self.attention_head_dim < 2 or self.attention_head_dim % 2:
            raise UserError(
                f"config.head_dim is {self.attention_head_dim}; it must be even: the rotary embedding turns pairs"
            )

    @property
    def attention_head_dim(self) -> int:
        """`head_dim`, or what it defaults to."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim
