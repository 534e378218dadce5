"""What MuSe attention is asked to compute: one immutable record of the options of `muse_attention`, checked."""

import ast
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal, get_args, get_origin, get_type_hints

Selection = Literal["peak_mass", "centroid"]
Expansion = Literal["centroid", "zero"]
Clustering = Literal["semantic", "spatial"]
Implementation = Literal["auto", "triton", "reference"]

KEY_CLUSTERS_PER_SUMMARY = 8
"""Key clusters behind one summary where `summary_cluster` is None. `benchmarks/NOTES.md`, "coarse summaries"."""

EXACT_CHUNKS = 7
"""Chunks up to which exact attention is no slower, measured: a row without documents, which cuDNN attends."""
EXACT_CHUNKS_OF_DOCUMENTS = 2
"""The same for packed documents: what PyTorch has for them, FlashAttention 2, is slower."""


@dataclass(frozen=True, kw_only=True)
class MuseOptions:
    """Options of the operator; the meaning of each is in `docs/attention.md`, "Definition".

    Raises:
        ValueError: an option's value is not accepted; the message names the option, the value and what is accepted.
    """

    causal: bool = True
    softmax_scale: float | None = None
    chunk: int = 2048
    query_cluster: int = 128
    key_cluster: int = 64
    summary_cluster: int | None = None
    top_k: int = 12
    candidates: int = 48
    order: int = 1
    selection: Selection = "peak_mass"
    expansion: Expansion = "centroid"
    query_clustering: Clustering = "semantic"
    key_clustering: Clustering = "semantic"
    exact_below: int | None = None
    workspace_mib: int = 1024
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name in ("query_cluster", "key_cluster"):
            size = getattr(self, name)
            ratio = self.chunk // size if size > 0 else 0
            if ratio < 1 or ratio * size != self.chunk or ratio & (ratio - 1):
                raise ValueError(f"chunk / {name} must be a power of two, got chunk={self.chunk}, {name}={size}")
        _check_summary_cluster(self)
        for name, least in (("top_k", 0), ("candidates", 1), ("exact_below", 0), ("workspace_mib", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.order not in (0, 1):
            raise ValueError(f"order must be 0 or 1, got {self.order}")
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")

    def resolved(self, head_dim: int, *, has_documents: bool = False) -> "ResolvedOptions":
        """The options with numbers in place of the defaults that depend on other values.

        Args:
            has_documents: `cu_seqlens` is given.
        """
        values = {name: getattr(self, name) for name in _FIELDS}
        values["softmax_scale"] = head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        if self.summary_cluster is None:
            values["summary_cluster"] = min(KEY_CLUSTERS_PER_SUMMARY * self.key_cluster, self.chunk)
        if self.exact_below is None:
            values["exact_below"] = (EXACT_CHUNKS_OF_DOCUMENTS if has_documents else EXACT_CHUNKS) * self.chunk
        return ResolvedOptions(**values)


def _check_summary_cluster(options: MuseOptions) -> None:
    size, chunk, key_cluster = options.summary_cluster, options.chunk, options.key_cluster
    if size is None:
        return
    sizes = [2**i * key_cluster for i in range((chunk // key_cluster).bit_length())]
    if size not in sizes:
        accepted = ", ".join(map(str, sizes))
        raise ValueError(
            f"summary_cluster must be one of {accepted} for chunk={chunk}, key_cluster={key_cluster}, got {size}"
        )


_FIELDS = tuple(field.name for field in fields(MuseOptions))
# Read from the annotations once: torch.compile cannot trace get_type_hints.
_CHOICES = {
    name: get_args(annotation)
    for name, annotation in get_type_hints(MuseOptions).items()
    if get_origin(annotation) is Literal
}


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(MuseOptions):
    """MuseOptions in which every value is known; what everything below the public function is given."""

    softmax_scale: float
    summary_cluster: int
    exact_below: int

    @property
    def query_clusters(self) -> int:
        """Query clusters per chunk."""
        return self.chunk // self.query_cluster

    @property
    def key_clusters(self) -> int:
        """Key clusters per chunk."""
        return self.chunk // self.key_cluster

    @property
    def summaries(self) -> int:
        """Summaries per chunk, for each query cluster that sees it."""
        return self.chunk // self.summary_cluster

    @property
    def key_clusters_per_summary(self) -> int:
        """Key clusters that one summary stands for."""
        return self.summary_cluster // self.key_cluster

    @property
    def first_choice(self) -> int:
        """Key clusters that selection by "peak_mass" chooses at first."""
        return max(self.top_k, self.candidates)

    def encoded(self) -> str:
        """The options as one text, exact, which is how the custom operators take them."""
        return ", ".join([f"{name}={getattr(self, name)!r}" for name in _FIELDS])

    @classmethod
    @cache
    def decoded(cls, text: str) -> "ResolvedOptions":
        """Inverse of `encoded`."""
        return cls(**{name: ast.literal_eval(value) for name, value in (item.split("=") for item in text.split(", "))})
