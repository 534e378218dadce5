"""What MuSe attention is asked to compute: one immutable record of the options of `muse_attention`, checked."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

Selection = Literal["query_mass", "centroid"]
Expansion = Literal["centroid", "zero"]
Clustering = Literal["semantic", "spatial"]
Implementation = Literal["auto", "reference"]


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
    top_k: int = 16
    order: int = 1
    selection: Selection = "query_mass"
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
        for name, least in (("top_k", 0), ("exact_below", 0), ("workspace_mib", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.order not in (0, 1):
            raise ValueError(f"order must be 0 or 1, got {self.order}")
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")

    def resolved(self, head_dim: int) -> "ResolvedOptions":
        """The options with numbers in place of the defaults that depend on other values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["softmax_scale"] = head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        values["exact_below"] = 4 * self.chunk if self.exact_below is None else self.exact_below
        return ResolvedOptions(**values)


# Read from the annotations once: torch.compile cannot trace get_type_hints.
_CHOICES = {
    name: get_args(annotation)
    for name, annotation in get_type_hints(MuseOptions).items()
    if get_origin(annotation) is Literal
}


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(MuseOptions):
    """MuseOptions in which every value is known; what the custom operators take, field by field."""

    softmax_scale: float
    exact_below: int

    @property
    def query_clusters(self) -> int:
        """Query clusters per chunk."""
        return self.chunk // self.query_cluster

    @property
    def key_clusters(self) -> int:
        """Key clusters per chunk."""
        return self.chunk // self.key_cluster

    def as_arguments(self) -> tuple[Any, ...]:
        """The fields in order: the custom operators take plain numbers and strings."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def from_arguments(cls, arguments: Iterable[Any]) -> "ResolvedOptions":
        """Inverse of `as_arguments`."""
        return cls(**dict(zip((field.name for field in fields(cls)), arguments, strict=True)))

    @classmethod
    def schema(cls) -> str:
        """The fields as arguments in a custom operator's schema."""
        hints = get_type_hints(cls)
        names = {bool: "bool", int: "int", float: "float"}
        return ", ".join(f"{names.get(hints[field.name], 'str')} {field.name}" for field in fields(cls))
