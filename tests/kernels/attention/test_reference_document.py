"""Memory of the reference operator: bounded by the workspace, linear in the length."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muse_kernels.attention.options import MuseOptions
from muse_kernels.attention.reference import Merged
from muse_kernels.attention.reference_document import document_backward, document_forward
from tests.kernels.attention.inputs import random_qkv


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes that tensors made inside hold at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.seen: set[int] = set()

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, size)
        return result


def peak_mib(num_tokens: int, workspace_mib: int) -> float:
    q, k, v = (x.detach() for x in random_qkv(num_tokens, heads=2, head_dim=16, dtype=torch.float32))
    options = MuseOptions(
        chunk=64, query_cluster=16, key_cluster=8, top_k=4, exact_below=0, workspace_mib=workspace_mib
    ).resolved(head_dim=16)
    with PeakMemory() as memory:
        out, lse, clusters = document_forward(q, k, v, options)
        document_backward(q, k, v, Merged(out, lse, torch.ones_like(out)), clusters, options)
    return memory.peak / 2**20


def test_memory_grows_with_the_length_not_its_square() -> None:
    short, long = peak_mib(2048, workspace_mib=1), peak_mib(8192, workspace_mib=1)
    assert long < 5 * short
    logits_of_dense_attention = 2 * 8192**2 * 4 / 2**20
    assert long < logits_of_dense_attention / 10


@pytest.mark.parametrize("workspace_mib", [8, 32])
def test_a_larger_workspace_is_used_and_kept_to(workspace_mib: int) -> None:
    least = peak_mib(4096, workspace_mib=1)
    peak = peak_mib(4096, workspace_mib=workspace_mib)
    assert least < peak < least + 1.5 * workspace_mib
