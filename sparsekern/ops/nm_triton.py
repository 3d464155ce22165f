"""Triton kernel of N:M weights for few tokens.

A decode step is bound by the bytes of the weight: 9/16 of the dense ones for 2:4 in 16 bits. The
kernel reads values and index, spreads each group to its M columns in registers, and multiplies by
tensor cores, which have nothing else to do there. Sums are cut into parts so that few rows of tiles
still fill the device. Nothing waits for the device; the call can be captured in a CUDA graph.
Triton is imported with this module.
"""

import torch
import triton
import triton.language as tl

from .decode_triton import INTERPRET, check_linear, run_split, split_for, store_tile
from .nm import slot_bits, slot_count

MAX_TOKENS = 64


@triton.jit
def _group_tile(
    values, index, row, group, inside, slots, row_bytes,
    N: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The dense weights (rows, groups, WIDE) of groups, WIDE being M as a power of two."""
    position = tl.arange(0, WIDE)[None, None, :]
    tile = tl.zeros((row.shape[0], group.shape[0], WIDE), values.dtype.element_ty)
    for i in tl.static_range(N):
        slot = group * N + i
        byte = tl.load(
            index + (row * row_bytes)[:, None] + (slot * BITS // 8)[None, :], mask=inside, other=0
        )
        code = (byte.to(tl.int32) >> (slot * BITS % 8)[None, :]) & ((1 << BITS) - 1)
        value = tl.load(values + (row * slots)[:, None] + slot[None, :], mask=inside, other=0)
        tile = tl.where(code[:, :, None] == position, value[:, :, None], tile)
    return tile


@triton.jit
def decode_kernel(
    x, values, index, bias, y, rows, cols, tokens, slots, row_bytes, steps,
    N: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight times all tokens, GROUPS groups of M columns a step."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    share = (steps + SPLIT - 1) // SPLIT
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        group = step * GROUPS + tl.arange(0, GROUPS)
        inside = (row < rows)[:, None] & (group * N < slots)[None, :]
        tile = _group_tile(
            values, index, row.to(tl.int64), group, inside, slots, row_bytes, N, M, WIDE, BITS
        )
        weight = tl.reshape(tile, (ROWS, GROUPS * WIDE))
        place = tl.arange(0, GROUPS * WIDE)
        if WIDE == M:  # runs that 16-byte loads may take
            column = step * (GROUPS * M) + place
            real = column < cols
        else:
            column = (step * GROUPS + place // WIDE) * M + place % WIDE
            real = (column < cols) & (place % WIDE < M)
        here = real[:, None] & (token < tokens)[None, :]
        right = tl.load(x + token[None, :] * cols + column[:, None], mask=here, other=0)
        if UPCAST:
            weight, right = weight.to(tl.float32), right.to(tl.float32)
        total = tl.dot(weight, right, total, input_precision="ieee")
    store_tile(total, y, bias, row, token, rows, tokens, part, SPLIT, HAS_BIAS, ACTIVATION)


def nm_decode(x, values, index, shape, bias=None, activation="none", split=None):
    """Compute act(x W^T + b) for at most 64 tokens of float32, float16 or bfloat16.

    Args:
        x: `(tokens, in)`.
        values: `(out, slots)`, as in `nm_linear`.
        index: `(out, bytes)` uint8, checked before.
        shape: `(out, in, n, m)`.
        bias: `(out,)` or None.
        activation: none, relu, gelu or gelu_tanh.
        split: Parts of each sum; by default what fills the device.

    Raises:
        RuntimeError: Too many tokens, or tensors that do not fit.
    """
    op = "nm_decode"
    rows, cols, n, m = shape
    check_linear(op, x, values, bias, rows, activation, MAX_TOKENS)
    slots = slot_count(cols, n, m)
    if x.dtype == torch.float64:
        raise RuntimeError(f"{op}: expected x of 16 or 32 bits, got {x.dtype}")
    if values.shape != (rows, slots) or index.shape[0] != rows or x.shape[1] != cols:
        raise RuntimeError(
            f"{op}: expected values of shape ({rows}, {slots}), index of {rows} rows and x with "
            f"{cols} columns, got {tuple(values.shape)}, {index.shape[0]} and {x.shape[1]}"
        )
    if 0 in (x.shape[0], rows):
        return x.new_empty((x.shape[0], rows))
    x, values, index = x.contiguous(), values.contiguous(), index.contiguous()
    wide = triton.next_power_of_2(m)
    block, groups = 64, 128 // wide
    tiles, steps = triton.cdiv(rows, block), triton.cdiv(triton.cdiv(cols, m), groups)
    split = split or split_for(tiles, steps, x.device)

    def arguments(y):
        sizes = (rows, cols, x.shape[0], slots, index.shape[1], steps)
        named = {"N": n, "M": m, "WIDE": wide, "BITS": slot_bits(m), "UPCAST": INTERPRET}
        named["TOKENS"] = max(16, triton.next_power_of_2(x.shape[0]))
        named |= {"ROWS": block, "GROUPS": groups, "num_warps": 4}
        return (x, values, index, bias, y, *sizes), named

    return run_split(decode_kernel, tiles, split, x, rows, bias, activation, arguments)
