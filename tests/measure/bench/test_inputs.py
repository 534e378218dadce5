"""Inputs that attention is timed on."""

from pathlib import Path

import pytest
import torch

from muse_lightning.errors import UserError
from muse_lightning.measure.bench.inputs import (
    Heads,
    cumulative_lengths,
    load_recorded,
    packed_lengths,
    random_inputs,
    recorded_inputs,
)

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16)


def test_random_inputs() -> None:
    q, k, v = random_inputs(10, HEADS, "cpu")
    assert [list(x.shape) for x in (q, k, v)] == [[1, 4, 10, 8], [1, 2, 10, 8], [1, 2, 10, 8]]
    assert q.dtype is torch.bfloat16
    assert not torch.equal(k, v)
    assert torch.equal(q, random_inputs(10, HEADS, "cpu")[0])


class TestRecorded:
    def test_heads_come_from_the_files_in_turn(self) -> None:
        first, second = torch.randn(3, 20, 8).bfloat16(), torch.randn(3, 20, 8).bfloat16()
        q, k, v = recorded_inputs([first, second], 50, HEADS, "cpu")
        assert (q.shape, k.shape, v.shape) == ((1, 4, 50, 8), (1, 2, 50, 8), (1, 2, 50, 8))
        for head, source in enumerate((first, second)):
            assert torch.equal(k[0, head], torch.cat([source[1]] * 3)[:50])
            assert torch.equal(v[0, head], torch.cat([source[2]] * 3)[:50])
            assert torch.equal(q[0, 2 * head], torch.cat([source[0]] * 3)[:50])
            assert torch.equal(q[0, 2 * head + 1], torch.cat([source[0]] * 3)[1:51])

    def test_more_heads_than_files_are_rolled(self) -> None:
        source = torch.randn(3, 20, 8).bfloat16()
        _, k, _ = recorded_inputs([source], 20, HEADS, "cpu")
        assert torch.equal(k[0, 1], source[1].roll(-1009, 0))

    def test_a_larger_head_is_several_side_by_side(self) -> None:
        first, second = torch.randn(3, 20, 4).bfloat16(), torch.randn(3, 20, 4).bfloat16()
        _, k, _ = recorded_inputs([first, second], 20, HEADS, "cpu")
        assert torch.equal(k[0, 0], torch.cat([first[1], second[1]], dim=-1))

    def test_files(self, tmp_path: Path) -> None:
        qkv = torch.randn(3, 5, 8)
        torch.save(qkv, tmp_path / "a.pt")
        (loaded,) = load_recorded([tmp_path / "a.pt"]).items()
        assert loaded[0] == "a"
        assert torch.equal(loaded[1], qkv)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.zeros(3, 5), r"holds torch.float32 \[3, 5\], expected a floating-point tensor \[3, N, D\]"),
            (torch.zeros(3, 5, 8, dtype=torch.int32), "holds torch.int32"),
            ({"q": 1}, "holds dict"),
        ],
    )
    def test_other_content(self, tmp_path: Path, content: object, message: str) -> None:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=message):
            load_recorded([tmp_path / "a.pt"])

    def test_files_that_do_not_fit_together(self, tmp_path: Path) -> None:
        for name, size in (("a", 4), ("b", 8)):
            torch.save(torch.zeros(3, 5, size), tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match="one head size, got 4, 8"):
            load_recorded([tmp_path / "a.pt", tmp_path / "b.pt"])
        with pytest.raises(UserError, match="names must differ"):
            load_recorded([tmp_path / "a.pt", tmp_path / "a.pt"])


def test_documents_fill_the_row() -> None:
    assert packed_lengths([5, 3], 10) == [5, 3, 2]
    assert packed_lengths([5, 3], 8) == [5, 3]
    assert packed_lengths([20], 8) == [8]
    assert cumulative_lengths([5, 3, 2]).tolist() == [0, 5, 8, 10]
