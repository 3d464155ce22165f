"""N:M weights to dense and back on the GPU, one pass over memory each.

Imports Triton: only what runs on a GPU (or in Triton's interpreter) imports this file.
"""

import torch
import triton
import triton.language as tl

from .cuda_support import ceil_div
from .nm import slot_bits

BLOCK = 1024


@triton.jit
def _expand(
    values, index, dense, channels, slots, row_bytes,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One row of the dense weight per program on axis 0, BLOCK columns (tap, channel) on axis 1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels * TAPS
    tap = column // channels
    group = (column % channels) // M * TAPS + tap
    position = (column % channels) % M
    total = tl.zeros([BLOCK], values.dtype.element_ty)
    for i in tl.static_range(N):
        slot = group * N + i
        taken = inside & (slot < slots)
        byte = tl.load(index + row * row_bytes + slot * BITS // 8, mask=taken, other=0)
        code = (byte.to(tl.int32) >> (slot * BITS % 8)) & ((1 << BITS) - 1)
        value = tl.load(values + row * slots + slot, mask=taken & (code == position), other=0.0)
        total = tl.where(code == position, value, total)
    # The compressor of cuSPARSELt takes -0.0 for a weight that is kept.
    total = tl.where(total.to(tl.float32) == 0.0, 0.0, total).to(total.dtype)
    tl.store(dense + row * (channels * TAPS) + column, total, mask=inside)


@triton.jit
def _collect(
    dense, index, values, channels, slots, row_bytes,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One row of the values per program on axis 0, BLOCK slots on axis 1."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    byte = tl.load(index + row * row_bytes + slot * BITS // 8, mask=inside, other=0)
    code = (byte.to(tl.int32) >> (slot * BITS % 8)) & ((1 << BITS) - 1)
    channel = slot // N // TAPS * M + code
    place = dense + row * (channels * TAPS) + channel * TAPS + slot // N % TAPS
    value = tl.load(place, mask=inside & (channel < channels), other=0.0)
    tl.store(values + row * slots + slot, value, mask=inside)


def nm_expand(
    values: torch.Tensor, index: torch.Tensor, channels: int, n: int, m: int, taps: int = 1
):
    """The dense weight `(rows, taps * channels)` of values `(rows, slots)`; -0.0 becomes 0.0."""
    rows, slots = values.shape
    dense = values.new_empty(rows, taps * channels)
    grid = (rows, ceil_div(taps * channels, BLOCK))
    sizes = (channels, slots, index.shape[1], n, m, slot_bits(m), BLOCK, taps)
    if dense.numel():
        _expand[grid](values, index, dense, *sizes)
    return dense


def nm_collect(dense: torch.Tensor, index: torch.Tensor, slots: int, n: int, m: int, taps: int = 1):
    """The values `(rows, slots)` of a dense weight `(rows, channels * taps)` where it is stored."""
    rows, channels = dense.shape[0], dense.shape[1] // taps
    values = dense.new_empty(rows, slots)
    grid = (rows, ceil_div(slots, BLOCK))
    if values.numel():
        _collect[grid](
            dense, index, values, channels, slots, index.shape[1], n, m, slot_bits(m), BLOCK, taps
        )
    return values
