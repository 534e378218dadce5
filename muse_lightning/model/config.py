"""LlamaConfig: every number of the architecture, under Hugging Face's names, so that `config.json` maps one to one."""

from dataclasses import dataclass
from typing import Literal

from muse_lightning.errors import UserError


@dataclass
class RopeScaling:
    """Llama 3.1's extension of the rotary embedding to contexts longer than those it was first trained on.

    Slow rotations (long wavelengths) are slowed further by `factor`, fast ones kept, those between interpolated.
    """

    factor: float
    """By how much the longest wavelengths are stretched."""

    original_max_position_embeddings: int
    """Context length, in tokens, of the training that came before the extension."""

    low_freq_factor: float = 1.0
    """Wavelengths above original_max_position_embeddings / low_freq_factor are stretched by the whole factor."""

    high_freq_factor: float = 4.0
    """Wavelengths below original_max_position_embeddings / high_freq_factor are kept."""

    rope_type: Literal["llama3"] = "llama3"
    """Name of the scheme in a Hugging Face config; `llama3` is the only one known here."""

    def __post_init__(self) -> None:
        if self.rope_type != "llama3":
            raise UserError(f"rope_scaling.rope_type is {self.rope_type!r}; accepted: llama3")
        if self.factor < 1:
            raise UserError(f"rope_scaling.factor is {self.factor}; it must be at least 1")
        if self.original_max_position_embeddings < 1:
            raise UserError(
                "rope_scaling.original_max_position_embeddings is "
                f"{self.original_max_position_embeddings}; it must be at least 1"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor}; it must be above 0 and below "
                f"high_freq_factor, {self.high_freq_factor}"
            )


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

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if getattr(self, name) <= 0:
                raise UserError(f"config.{name} is {getattr(self, name)}; it must be above 0")
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
