"""The interpreter itself: what our kernels rely on, seen on the smallest one."""

import torch
import triton
import triton.language as tl


@triton.jit
def scaled_sum(x, y, out, n, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(x + at, inside).to(tl.float32) + tl.load(y + at, inside).to(tl.float32)
    tl.store(out + at, total * scale, inside)


def test_masked_loads_and_stores_in_bfloat16():
    x, y = torch.randn(2, 37, dtype=torch.bfloat16)
    out = torch.full((40,), 7.0, dtype=torch.bfloat16)
    scaled_sum[(3,)](x, y, out, 37, 0.5, BLOCK=16)
    want = ((x.float() + y.float()) * 0.5).bfloat16()
    torch.testing.assert_close(out[:37], want)
    assert bool((out[37:] == 7).all())
