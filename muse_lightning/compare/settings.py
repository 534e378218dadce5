"""What is compared: exact attention, MuSe, its baselines, and a grid of MuSe's options."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

from muse_kernels.attention.options import MuseOptions
from muse_lightning.attention import Muse, SlidingWindow, SpatialBlocks, exact_attention, exact_in, layer_numbers
from muse_lightning.attention.partly_exact import spread_heads
from muse_lightning.errors import UserError
from muse_lightning.model.llama import AttentionFactory

EXACT = "Dense"
MUSE = "Muse"
# What a layer decides, not a recipe.
_OF_THE_LAYER = ("causal", "softmax_scale")
# What a grid varies beside MuSe's options, with what it is without.
_NOTHING_EXACT: dict[str, Any] = {"exact_layers": (), "exact_heads": 0}


@dataclass(frozen=True)
class Setting:
    """One way to attend.

    Attributes:
        name: For tables.
        attention: Makes the strategy of a layer.
        muse: Options of `muse_attention`, where that is what every layer calls.
        recipe: `model.attention` of a recipe that trains with it.
        exact_layers: its `model.exact_layers`; `attention` has them.
        exact_heads: its `model.exact_heads`; `attention` has them as soon as they are chosen (exact_heads.py).
        heads: those that are chosen: by layer that is not exact, its key-value heads.
        elsewhere: attention of what is not exact, where something is.
        is_swept: Whether it is a point of the grid: only its loss, its error and its cost are measured.
    """

    name: str
    attention: AttentionFactory
    muse: dict[str, Any] | None
    recipe: Any
    exact_layers: tuple[int, ...] = ()
    exact_heads: int = 0
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    elsewhere: AttentionFactory | None = None
    is_swept: bool = False

    def exact_layer_numbers(self, num_layers: int) -> set[int]:
        """Its exact layers, all counted from 0."""
        return layer_numbers(self.exact_layers, num_layers, "exact_layers")

    def num_exact(self, num_layers: int, num_kv_heads: int) -> int:
        """Its exact key-value heads, those of exact layers included."""
        return len(self.exact_layer_numbers(num_layers)) * num_kv_heads + self.exact_heads


@dataclass(frozen=True)
class Grid:
    """MuSe's options that a sweep tries, every combination of them but those that would leave nothing approximated."""

    chunk: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens per chunk."""
    query_cluster: tuple[int, ...] | None = None
    """Tokens per query cluster; null: as --muse has it."""
    key_cluster: tuple[int, ...] | None = None
    """Tokens per key cluster; null: as --muse has it."""
    top_k: tuple[int, ...] = (4, 8, 12, 24, 48)
    """Key clusters that each query cluster attends exactly."""
    summary_cluster: tuple[int | None, ...] | None = None
    """Keys behind one summary, of which null is 8 key clusters; null: as --muse has it."""
    exact_layers: tuple[tuple[int, ...], ...] | None = None
    """Layers that attend exactly instead, as model.exact_layers has them; null: as --exact_layers has them."""
    exact_heads: tuple[int, ...] | None = None
    """Key-value heads of the other layers that attend exactly instead, as model.exact_heads has them; null: as many as
    --exact_heads says."""

    def points(
        self, base: MuseOptions, exact_layers: tuple[int, ...], exact_heads: int
    ) -> Iterator[tuple[str, MuseOptions, tuple[int, ...], int]]:
        """The name of every combination, `base` with it, its exact layers and its number of exact heads.

        Args:
            exact_layers, exact_heads: where the grid does not say.
        Raises:
            UserError: a list is empty, or a combination is not accepted.
        """
        there = asdict(base) | {"exact_layers": exact_layers, "exact_heads": exact_heads}
        values = {name: (there[name],) if each is None else each for name, each in vars(self).items()}
        for name, each in values.items():
            if not each:
                raise UserError(f"grid.{name}: at least one value expected, found none")
        # What tells a point from another one, or from MuSe with nothing exact.
        base_values = there | _NOTHING_EXACT
        named = [name for name, each in values.items() if {*each, base_values[name]} != {each[0]}]
        for combination in itertools.product(*values.values()):
            changes: dict[str, Any] = dict(zip(values, combination, strict=True))
            name = ", ".join(f"{name} {_shown(changes[name])}" for name in named)
            layers, heads = (changes.pop(name) for name in _NOTHING_EXACT)
            try:
                point = replace(base, **changes)
            except ValueError as error:
                raise UserError(f"grid: {error}") from None
            yield name, point, layers, heads


def make_settings(
    muse: MuseOptions,
    window: int,
    exact_window: int | None,
    grid: Grid | None,
    num_layers: int,
    num_kv_heads: int,
    exact_layers: tuple[int, ...] = (),
    exact_heads: int = 0,
) -> list[Setting]:
    """Exact attention first, then MuSe and its baselines, these with some layers and heads exact, and the points of the
    grid that are not among them. Which heads are exact is not chosen yet.

    Args:
        muse: MuSe's options; the spatial blocks get as many chunks, clusters and retrieved keys.
        window: of the sliding window.
        exact_window: the window that the model's own attention has; None: it sees everything.
        grid: None: no sweep.
        num_layers, num_kv_heads: of the model.
        exact_layers, exact_heads: of the second ones, as in `model`. If no layer and no head is exact, or all layers
            are, these are left out.
    Raises:
        UserError: an option that is not a recipe's, or a value that is not accepted, such as so many exact heads that
            nothing is left.
    """
    for name in _OF_THE_LAYER:
        if getattr(muse, name) != getattr(MuseOptions(), name):
            raise UserError(f"muse.{name}: {getattr(muse, name)} found; it is the model's, expected none")
    shared = ("chunk", "query_cluster", "key_cluster", "top_k", "exact_below", "workspace_mib")
    blocks = {name: getattr(muse, name) for name in shared}
    name, exact = EXACT, cast(Any, EXACT)
    if exact_window is not None:
        name = f"exact, window {exact_window:,}"
        exact = {"class_path": "SlidingWindow", "init_args": {"window": exact_window}}
    settings = [
        Setting(name, exact_attention(exact_window), None, exact),
        _muse_setting(MUSE, muse),
        Setting(
            "SpatialBlocks",
            partial(SpatialBlocks, **blocks),
            SpatialBlocks(0, **blocks).options,
            {"class_path": "SpatialBlocks", "init_args": blocks},
        ),
        Setting(
            f"SlidingWindow {window:,}",
            partial(SlidingWindow, window=window),
            None,
            {"class_path": "SlidingWindow", "init_args": {"window": window}},
        ),
    ]
    for setting in settings:
        setting.attention(0)  # A value that is not accepted shows here, not when its turn comes.
    with_exact = partial(_with_exact_layers, num_layers=num_layers, window=exact_window)
    with_heads = partial(_with_exact_heads, num_layers=num_layers, num_kv_heads=num_kv_heads)
    again = [with_exact(each, exact_layers, option="exact_layers") for each in settings[1:]]
    again = [with_heads(each, exact_heads, option="exact_heads") for each in again]
    numbers = ", ".join(map(str, exact_layers))
    named = [f"layer{'s' * (len(exact_layers) != 1)} {numbers} exact"] if exact_layers else []
    named += [f"{exact_heads} head{'s' * (exact_heads != 1)} exact"] if exact_heads else []
    left = num_layers * num_kv_heads - again[0].num_exact(num_layers, num_kv_heads)
    if exact_heads and not left:
        raise UserError(
            f"exact_heads: {exact_heads} found, which leaves nothing to approximate; accepted with exact_layers "
            f"{[*exact_layers]}: 0 to {exact_heads - 1}"
        )
    if named and left:
        settings += [replace(each, name="; ".join([each.name, *named]), muse=None) for each in again]
    if grid is None:
        return settings
    there = {(each.exact_layers, each.exact_heads) for each in settings}
    for name, point, layers, heads in grid.points(muse, exact_layers if left else (), exact_heads if left else 0):
        swept = with_exact(_muse_setting(name, point), layers, option=_asked("exact_layers", grid))
        swept = with_heads(swept, heads, option=_asked("exact_heads", grid))
        is_row = point == muse and (layers, heads) in there
        if not is_row and swept.num_exact(num_layers, num_kv_heads) < num_layers * num_kv_heads:
            settings.append(replace(swept, is_swept=True))
    return settings


def _asked(name: str, grid: Grid) -> str:
    """The option that says what a point of the grid has of it."""
    return name if getattr(grid, name) is None else f"grid.{name}"


def _shown(value: Any) -> str:
    return str([*value]) if isinstance(value, tuple) else str(value)


def _with_exact_layers(
    setting: Setting, layers: tuple[int, ...], *, num_layers: int, window: int | None, option: str
) -> Setting:
    attention = exact_in(layers, setting.attention, num_layers=num_layers, window=window, option=option)
    return replace(setting, attention=attention, exact_layers=layers, elsewhere=setting.attention)


def _with_exact_heads(setting: Setting, count: int, *, num_layers: int, num_kv_heads: int, option: str) -> Setting:
    exact_layers = setting.exact_layer_numbers(num_layers)
    spread_heads(count, exact_layers=exact_layers, num_layers=num_layers, num_kv_heads=num_kv_heads, option=option)
    return replace(setting, exact_heads=count)


def _muse_setting(name: str, options: MuseOptions) -> Setting:
    init_args = {key: value for key, value in asdict(options).items() if key not in _OF_THE_LAYER}
    return Setting(name, partial(Muse, **init_args), init_args, {"class_path": "Muse", "init_args": init_args})
