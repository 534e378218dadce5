"""What a group of heads and rows takes, against its buffers and the bound."""

import pytest
import torch

from muse_kernels.attention.chunks import num_rows
from muse_kernels.attention.options import MuseOptions
from muse_kernels.attention.workspace import Workspace


@pytest.mark.parametrize("workspace_mib", [1, 4, 1024])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_largest_group(workspace_mib: int, backward: bool) -> None:
    options = MuseOptions(
        chunk=256, query_cluster=32, key_cluster=16, summary_cluster=16, exact_below=0, workspace_mib=workspace_mib
    ).resolved(64)
    q, k = torch.empty(1, 8, 4096, 64, dtype=torch.float16), torch.empty(1, 4, 4096, 64, dtype=torch.float16)
    workspace = Workspace(q, k, num_rows(4096, None, options), options, backward=backward)
    sizes = []
    for group in workspace.groups():
        buffers = [*workspace.keys(group)[:2], *workspace.summaries(group)]
        if backward:
            buffers += [
                *workspace.queries(group),
                *(() if group.is_first and group.is_last else workspace.key_sums(group)),
            ]
        else:
            buffers.append(workspace.scores(group))
        sizes.append(sum(buffer.nbytes for buffer in buffers))
    found = workspace.largest_group()
    # Backward, the inverted lists and what lies beside the summaries are no buffers of the workspace.
    assert max(sizes) * 0.99 <= found <= max(sizes) * (1.6 if backward else 1.01)
    assert (len(sizes) == 1) == (workspace_mib == 1024)
    if len(sizes) == 1:
        assert found <= workspace_mib * 2**20


def test_without_far_keys_there_is_no_group() -> None:
    options = MuseOptions(chunk=256, query_cluster=32, key_cluster=16).resolved(64)
    q = torch.empty(1, 2, 512, 64)
    assert Workspace(q, q, num_rows(512, None, options), options, backward=True).largest_group() == 0
