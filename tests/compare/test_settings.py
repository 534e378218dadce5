"""Settings: what is compared, and what a grid makes of MuSe's options."""

from dataclasses import replace

import pytest

from muse_lightning.attention import Dense, Muse, SlidingWindow, SpatialBlocks
from muse_lightning.compare.settings import Grid, make_settings
from muse_lightning.errors import UserError
from tests.compare.conftest import KV_HEADS, LAYERS, MUSE


def test_the_baselines_match_muse() -> None:
    dense, muse, blocks, window = (each.attention(3) for each in make_settings(MUSE, 12, None, None, LAYERS, KV_HEADS))
    assert isinstance(dense, Dense)
    assert isinstance(muse, Muse)
    assert isinstance(blocks, SpatialBlocks)
    assert isinstance(window, SlidingWindow)
    for name in ("chunk", "query_cluster", "key_cluster", "top_k", "exact_below"):
        assert muse.options[name] == blocks.options[name] == getattr(MUSE, name)
    assert window.window == 12
    assert muse.layer_idx == 3


def test_a_windowed_model_is_compared_with_its_own_attention() -> None:
    exact = make_settings(MUSE, 12, 40, None, LAYERS, KV_HEADS)[0]
    assert exact.name == "exact, window 40"
    assert exact.attention(0).window == 40
    assert exact.recipe == {"class_path": "SlidingWindow", "init_args": {"window": 40}}


def test_a_grid_is_every_combination_but_the_default() -> None:
    grid = Grid(chunk=(16, 32), query_cluster=(8,), key_cluster=(4,), top_k=(1, 2))
    swept = make_settings(MUSE, 12, None, grid, LAYERS, KV_HEADS)[4:]
    assert {(each.muse["chunk"], each.muse["top_k"]) for each in swept if each.muse} == {(16, 2), (32, 1), (32, 2)}
    assert all(each.is_swept and each.recipe["init_args"] == each.muse for each in swept)
    assert swept[0].name == "chunk 16, top_k 2"


def test_a_grid_of_summaries_leaves_their_default_out() -> None:
    grid = Grid(chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(1,), summary_cluster=(None, 4, 8))
    swept = make_settings(MUSE, 12, None, grid, LAYERS, KV_HEADS)[4:]
    assert [each.muse["summary_cluster"] for each in swept if each.muse] == [4, 8]
    assert [each.name for each in swept] == ["summary_cluster 4", "summary_cluster 8"]


def test_a_grid_of_exact_layers() -> None:
    grid = Grid(chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(1, 2), exact_layers=((), (-1,), (0, -1)))
    swept = make_settings(MUSE, 12, 40, grid, num_layers=3, num_kv_heads=KV_HEADS)[4:]
    assert [each.name for each in swept] == [
        "top_k 1, exact_layers [-1]",
        "top_k 1, exact_layers [0, -1]",
        "top_k 2, exact_layers []",
        "top_k 2, exact_layers [-1]",
        "top_k 2, exact_layers [0, -1]",
    ]
    last = [each.attention(layer) for each in swept[-1:] for layer in range(3)]
    assert [type(strategy) for strategy in last] == [SlidingWindow, Muse, SlidingWindow]
    assert last[0].window == 40
    assert last[1].options["top_k"] == 2


def test_all_once_more_with_exact_layers() -> None:
    settings = make_settings(MUSE, 12, None, None, 3, KV_HEADS, (0, -1))
    kinds = [[type(each.attention(layer)) for layer in range(3)] for each in settings]
    approximations = [Muse, SpatialBlocks, SlidingWindow]
    assert kinds == [
        [Dense] * 3,
        *([kind] * 3 for kind in approximations),
        *([Dense, kind, Dense] for kind in approximations),
    ]
    assert [each.name for each in settings[4:]] == [f"{each.name}; layers 0, -1 exact" for each in settings[1:4]]
    assert [each.recipe for each in settings[4:]] == [each.recipe for each in settings[1:4]]
    assert [each.exact_layers for each in settings] == [()] * 4 + [(0, -1)] * 3


def test_all_once_more_with_exact_heads() -> None:
    settings = make_settings(MUSE, 12, None, None, 3, KV_HEADS, (), 5)
    assert len(settings) == 7
    assert [each.name for each in settings[4:]] == [f"{each.name}; 5 heads exact" for each in settings[1:4]]
    assert [each.recipe for each in settings[4:]] == [each.recipe for each in settings[1:4]]
    assert [(each.exact_layers, each.exact_heads) for each in settings[4:]] == [((), 5)] * 3
    assert [each.muse for each in settings[4:]] == [None] * 3  # its options are not those of every head
    both = make_settings(MUSE, 12, None, None, 3, KV_HEADS, (0, -1), 1)[4:]
    assert [each.name for each in both] == [f"{each.name}; layers 0, -1 exact; 1 head exact" for each in settings[1:4]]
    assert [(each.exact_layers, each.exact_heads) for each in both] == [((0, -1), 1)] * 3
    assert [type(each.attention(0)) for each in both] == [Dense] * 3
    assert make_settings(MUSE, 12, None, None, 3, KV_HEADS, (), 1)[4].name == "Muse; 1 head exact"


@pytest.mark.parametrize(("layers", "count"), [((), LAYERS * KV_HEADS), ((0, -LAYERS), (LAYERS - 1) * KV_HEADS)])
def test_heads_that_leave_nothing_are_refused(layers: tuple[int, ...], count: int) -> None:
    said = (
        rf"^exact_heads: {count} found, which leaves nothing to approximate; accepted with exact_layers \[.*\]: 0 to "
    )
    with pytest.raises(UserError, match=said + str(count - 1)):
        make_settings(MUSE, 12, None, None, LAYERS, KV_HEADS, layers, count)
    assert len(make_settings(MUSE, 12, None, None, LAYERS, KV_HEADS, layers, count - 1)) == 7


def test_a_grid_is_of_what_is_asked_for_beside_it() -> None:
    muse = replace(MUSE, query_cluster=4, key_cluster=8, summary_cluster=16)
    [swept] = make_settings(muse, 12, None, Grid(chunk=(32,), top_k=(2,)), 3, KV_HEADS, (0,), 1)[7:]
    assert swept.name == "chunk 32, top_k 2, exact_layers [0], exact_heads 1"
    assert swept.muse is not None
    assert [swept.muse[name] for name in ("query_cluster", "key_cluster", "summary_cluster")] == [4, 8, 16]
    assert (swept.exact_layers, swept.exact_heads) == ((0,), 1)
    # Where all layers would be exact, none is.
    [swept] = make_settings(muse, 12, None, Grid(chunk=(32,), top_k=(2,)), 2, KV_HEADS, (0, -1))[4:]
    assert (swept.name, swept.exact_layers) == ("chunk 32, top_k 2", ())


def test_a_grid_leaves_out_what_approximates_nothing() -> None:
    grid = Grid(chunk=(16,), top_k=(1,), exact_layers=((), (0,)), exact_heads=(0, KV_HEADS))
    swept = make_settings(MUSE, 12, None, grid, LAYERS, KV_HEADS)[4:]
    assert [(each.exact_layers, each.exact_heads) for each in swept] == [((), KV_HEADS), ((0,), 0)]


def test_a_grid_of_exact_heads() -> None:
    grid = Grid(
        chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(1,), exact_layers=((), (-1,)), exact_heads=(0, 2)
    )
    swept = make_settings(MUSE, 12, None, grid, 3, KV_HEADS)[4:]
    assert [each.name for each in swept] == [
        "exact_layers [], exact_heads 2",
        "exact_layers [-1], exact_heads 0",
        "exact_layers [-1], exact_heads 2",
    ]
    assert [(each.exact_layers, each.exact_heads) for each in swept] == [((), 2), ((-1,), 0), ((-1,), 2)]
    of_rows = make_settings(MUSE, 12, None, grid, 3, KV_HEADS, (-1,), 2)[7:]
    assert [each.name for each in of_rows] == ["exact_layers [], exact_heads 2", "exact_layers [-1], exact_heads 0"]
    one = replace(grid, exact_layers=((),), exact_heads=(2,))
    assert [each.name for each in make_settings(MUSE, 12, None, one, 3, KV_HEADS)[4:]] == ["exact_heads 2"]


@pytest.mark.parametrize("count", [-1, 5])
def test_exact_heads_that_are_not_there(count: int) -> None:
    with pytest.raises(UserError, match=f"^exact_heads is {count}; accepted: 0 to 4, the key-value heads"):
        make_settings(MUSE, 12, None, None, LAYERS, KV_HEADS, (), count)


@pytest.mark.parametrize(("layers", "exact"), [(2, (0, -1)), (1, (0, -1)), (1, (0,)), (3, ())])
def test_not_where_no_layer_or_every_layer_would_be_exact(layers: int, exact: tuple[int, ...]) -> None:
    assert len(make_settings(MUSE, 12, None, None, layers, KV_HEADS, exact)) == 4


def test_a_grid_does_not_repeat_them() -> None:
    grid = Grid(chunk=(16,), query_cluster=(8,), key_cluster=(4,), top_k=(1, 2), exact_layers=((), (0, -1)))
    swept = make_settings(MUSE, 12, None, grid, 3, KV_HEADS, (0, -1))[7:]
    assert [each.name for each in swept] == ["top_k 2, exact_layers []", "top_k 2, exact_layers [0, -1]"]


def test_heads_beside_a_grid_of_layers_are_called_as_they_were_asked_for() -> None:
    with pytest.raises(UserError, match=r"^exact_heads is 3; accepted: 0 to 2, the key-value heads"):
        make_settings(MUSE, 12, None, Grid(exact_layers=((0,),)), LAYERS, KV_HEADS, (), 3)


def test_exact_layers_that_are_not_there() -> None:
    with pytest.raises(UserError, match="exact_layers names layer 3; accepted: 0 to 2"):
        make_settings(MUSE, 12, None, None, 3, KV_HEADS, (3,))


@pytest.mark.parametrize(
    ("muse", "grid", "message"),
    [
        (replace(MUSE, causal=False), None, "muse.causal: False found"),
        (replace(MUSE, softmax_scale=1.0), None, "muse.softmax_scale: 1.0 found"),
        (MUSE, Grid(exact_layers=((0, 2),)), "grid.exact_layers names layer 2; accepted: 0 to 1"),
        (MUSE, Grid(exact_layers=((0,),), exact_heads=(3,)), "grid.exact_heads is 3; accepted: 0 to 2, the key-value"),
        (MUSE, Grid(exact_heads=()), "grid.exact_heads: at least one value expected"),
        (MUSE, Grid(top_k=()), "grid.top_k: at least one value expected"),
        (MUSE, Grid(chunk=(24,), key_cluster=(4,), query_cluster=(8,)), "grid: chunk / query_cluster must be a power"),
    ],
)
def test_mistakes(muse: object, grid: Grid | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_settings(muse, 12, None, grid, LAYERS, KV_HEADS)
