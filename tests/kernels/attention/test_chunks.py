"""The chunk table against plain Python loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muse_kernels.attention.chunks import ChunkTable, chunk_table, document_bounds, num_rows
from muse_kernels.attention.options import MuseOptions, ResolvedOptions

CHUNK = 32


def options(exact_below: int) -> ResolvedOptions:
    return MuseOptions(chunk=CHUNK, query_cluster=16, key_cluster=16, exact_below=exact_below).resolved(16)


def used_rows(lengths: list[int], exact_below: int) -> list[tuple[int, int, int, int]]:
    """(start, length, first, end) of every row that a document takes."""
    rows: list[tuple[int, int, int, int]] = []
    begin = 0
    for document in lengths:
        first = len(rows)
        starts = range(begin, begin + document, CHUNK) if document > exact_below else []
        rows += [(start, min(CHUNK, begin + document - start), first, first + len(starts)) for start in starts]
        begin += document
    return rows


def rows_of(table: ChunkTable) -> list[tuple[int, ...]]:
    assert all(x.dtype == torch.int32 and x.dim() == 1 for x in table)
    return list(zip(*(x.tolist() for x in table), strict=True))


def unused(rows: range, num_tokens: int) -> list[tuple[int, int, int, int]]:
    return [(num_tokens, 0, row, row) for row in rows]


def boundaries(lengths: list[int], device: torch.device, padding: int = 0) -> torch.Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(padding)]).to(device, torch.int32)


@pytest.mark.parametrize("num_tokens", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 4 * CHUNK + 5])
@pytest.mark.parametrize("exact_below", [0, 1, CHUNK, 2 * CHUNK])
def test_one_row_of_tokens_is_one_document(num_tokens: int, exact_below: int, device: torch.device) -> None:
    table = chunk_table(num_tokens, None, options(exact_below), device)
    assert rows_of(table) == used_rows([num_tokens], exact_below)
    assert num_rows(num_tokens, None, options(exact_below)) == table.start.shape[0]


document_lengths = st.lists(st.sampled_from([0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 100, 200]), min_size=1, max_size=12)


@given(document_lengths, st.integers(0, 5), st.sampled_from([0, 1, 31, 32, 33, 64, 100, 1000]))
def test_documents(lengths: list[int], padding: int, exact_below: int) -> None:
    num_tokens = sum(lengths)
    cu_seqlens = boundaries(lengths, torch.device("cpu"), padding)
    table = chunk_table(num_tokens, cu_seqlens, options(exact_below), cu_seqlens.device)
    count = num_rows(num_tokens, cu_seqlens.shape[0] - 1, options(exact_below))
    expected = used_rows(lengths, exact_below)
    assert len(expected) <= count
    assert rows_of(table) == expected + unused(range(len(expected), count), num_tokens)


@pytest.mark.parametrize("lengths", [[33] * 8, [65, 1, 65, 1], [CHUNK + 1]])
def test_as_many_rows_as_sizes_promise_can_be_needed(lengths: list[int], device: torch.device) -> None:
    """Documents just longer than `exact_below` and chunks that hold one token: few rows are left over."""
    cu_seqlens = boundaries(lengths, device)
    exact_below = min(length for length in lengths if length > 1) - 1
    table = chunk_table(sum(lengths), cu_seqlens, options(exact_below), device)
    needed = len(used_rows(lengths, exact_below))
    assert needed <= table.start.shape[0] <= needed + 1


int32 = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(st.one_of(int32, st.integers(-3, 400)), min_size=2, max_size=10), st.integers(0, 300))
def test_garbage_in_cu_seqlens_leads_nowhere_outside(values: list[int], num_tokens: int) -> None:
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    bounds = document_bounds(num_tokens, cu_seqlens).tolist()
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, num_tokens)
    table = chunk_table(num_tokens, cu_seqlens, options(40), cu_seqlens.device)
    count = num_rows(num_tokens, len(values) - 1, options(40))
    rows = rows_of(table)
    assert len(rows) == count
    seen_until = 0
    for row, (start, length, first, end) in enumerate(rows):
        assert seen_until <= start <= num_tokens  # chunks do not overlap either
        assert 0 <= length <= CHUNK
        assert start + length <= num_tokens
        assert 0 <= first <= row <= end <= count
        assert (length == 0) == (end == row)
        seen_until = start + length


@pytest.mark.gpu
def test_nothing_is_read_on_the_host(device: torch.device) -> None:
    cu_seqlens = boundaries([100, 0, 33, 64, 200], device)
    expected = chunk_table(397, cu_seqlens.cpu(), options(40), torch.device("cpu"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        table = chunk_table(397, cu_seqlens, options(40), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows_of(table) == rows_of(expected)
