"""N:M weights to dense and back, on the interpreter."""

import pytest
import torch
from samples import random_nm

from sparsekern.ops import nm_expand_triton
from sparsekern.ops.nm import nm_to_dense, slot_channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "channels", "n", "m"),
    [(5, 32, 2, 4), (3, 38, 2, 4), (2, 15, 5, 9), (4, 16, 8, 16), (1, 7, 1, 2), (3, 2100, 2, 4)],
)
def test_there_and_back(dtype, rows, channels, n, m):
    values, index = random_nm(rows, channels, n, m)
    values = values.to(dtype)
    values.view(-1)[0] = -0.0
    dense = nm_expand_triton.nm_expand(values, index, channels, n, m)
    assert torch.equal(dense, nm_to_dense("test", values, index, channels, n, m))
    assert not bool(torch.signbit(dense[dense == 0]).any())  # no -0.0: see the kernel
    given = torch.randn(rows, channels).to(dtype)
    back = nm_expand_triton.nm_collect(given, index, values.shape[1], n, m)
    assert torch.equal(back, given.gather(1, slot_channels(index, channels, n, m).flatten(1)))
