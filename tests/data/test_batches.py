"""The batch of a few blocks, written out by hand."""

import pytest
import torch

from muse_lightning.data.batches import Collate, cumulative_lengths, cut_documents
from muse_lightning.data.block_reader import Block
from tests.tiny import SEQ_LEN, batches


def block(tokens: list[int], starts: list[int]) -> Block:
    return Block(torch.tensor(tokens, dtype=torch.uint16), torch.tensor(starts, dtype=torch.int64))


def test_batch_by_hand():
    blocks = [block([1, 2, 3, 4, 5], [0, 2]), block([6, 7, 8, 9, 10], [1, 4]), block([11, 12, 13, 14, 15], [])]
    batch = Collate(document_mask=True)(blocks)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9], [11, 12, 13, 14]]
    # 3, 7 and 10 are the first tokens of documents.
    assert batch["labels"].tolist() == [[2, -100, 4, 5], [-100, 8, 9, -100], [12, 13, 14, 15]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["cu_seqlens"].dtype == torch.int32
    # 10 is no input, so that no sequence begins there.
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 5, 8] + [12] * 59


def test_without_document_mask_only_the_boundaries_for_attention_go():
    batch = Collate(document_mask=False)([block([1, 2, 3], [1])])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[-100, 3]]


@pytest.mark.parametrize(("sequences", "length"), [(1, 64), (62, 64), (63, 64), (64, 128), (127, 128), (128, 256)])
def test_length_is_a_power_of_two(sequences, length):
    result = cumulative_lengths([torch.arange(sequences)], 1000)
    assert len(result) == length
    assert result[: sequences + 1].tolist() == [*range(sequences), 1000]
    assert (result[sequences:] == 1000).all()


@pytest.mark.parametrize("length", [1, 3, 6, 48])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole-rows"])
def test_cuts(packed: bool, length: int) -> None:
    [batch] = batches(1, packed=packed)
    found = cut_documents(batch, length).tolist()
    expected = {row * SEQ_LEN + start for row in range(2) for start in range(0, SEQ_LEN, length)} | {2 * SEQ_LEN}
    expected |= set(batch["cu_seqlens"].tolist() if packed else [])
    assert found[: len(expected)] == sorted(expected)  # each once: no document is empty
    assert set(found[len(expected) :]) <= {2 * SEQ_LEN}
    assert len(found) == max(64, 1 << (len(found) - 1).bit_length())
    assert cut_documents(batch, length).dtype == torch.int32
