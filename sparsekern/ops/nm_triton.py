"""Triton kernel of N:M weights for few tokens.

A decode step is bound by the bytes of the weight: 9/16 of the dense ones for 2:4 in 16 bits. The
kernel reads values and index, spreads each group to its M columns in registers, and multiplies by
tensor cores, which have nothing else to do there. Sums are cut into parts so that few rows of tiles
still fill the device. Nothing waits for the device; the call can be captured in a CUDA graph.

As in a dense layer, an infinite or NaN input also reaches outputs that do not store its weight
(0 * inf). Triton is imported with this module.
"""

import torch
import triton
import triton.language as tl

from .cuda_support import ceil_div, power_of_two
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
def _spread_pair(pair, code):
    """Four 16-bit columns (uint64) of two values (the low 32 bits of uint64) and their places."""
    first = (pair & 0xFFFF) << ((code & 3) * 16)
    return first | ((pair >> 16) & 0xFFFF) << (((code >> 2) & 3) * 16)


@triton.jit
def _column(group, J: tl.constexpr, DTYPE: tl.constexpr):
    return (group >> (16 * J)).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def _two_of_four(values, index, row, byte, inside, slots, row_bytes, BYTES: tl.constexpr):
    """The dense weights (rows, 8 * BYTES) of bytes of a 2:4 index, 16-bit values.

    A lane takes a byte: four values in one load, which two 64-bit shifts a group send to their
    columns. The joins leave the eight neighbours where they are.
    """
    DTYPE: tl.constexpr = values.dtype.element_ty
    code = tl.load(index + (row * row_bytes)[:, None] + byte[None, :], mask=inside, other=0)
    code = code.to(tl.uint64)
    fours = values.to(tl.pointer_type(tl.uint64)) + (row * (slots // 4))[:, None] + byte[None, :]
    four = tl.load(fours, mask=inside, other=0)
    low, high = _spread_pair(four, code), _spread_pair(four >> 32, code >> 4)
    c0, c1 = _column(low, 0, DTYPE), _column(low, 1, DTYPE)
    c2, c3 = _column(low, 2, DTYPE), _column(low, 3, DTYPE)
    c4, c5 = _column(high, 0, DTYPE), _column(high, 1, DTYPE)
    c6, c7 = _column(high, 2, DTYPE), _column(high, 3, DTYPE)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))  # the innermost join varies slowest
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.reshape(tl.join(even, odd), (row.shape[0], 8 * BYTES))


@triton.jit
def decode_kernel(
    x, values, scales, index, bias, y, rows, cols, tokens, slots, row_bytes, steps,
    N: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr,
    SCALED: tl.constexpr, FLOAT8: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight times all tokens, GROUPS groups of M columns a step."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    share = (steps + SPLIT - 1) // SPLIT
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        wide_row = row.to(tl.int64)
        if PACKED:
            byte = step * (GROUPS // 2) + tl.arange(0, GROUPS // 2)
            inside = (row < rows)[:, None] & (byte < row_bytes)[None, :]
            weight = _two_of_four(
                values, index, wide_row, byte, inside, slots, row_bytes, GROUPS // 2
            )
        else:
            group = step * GROUPS + tl.arange(0, GROUPS)
            inside = (row < rows)[:, None] & (group * N < slots)[None, :]
            tile = _group_tile(
                values, index, wide_row, group, inside, slots, row_bytes, N, M, WIDE, BITS
            )
            weight = tl.reshape(tile, (ROWS, GROUPS * WIDE))
        if FLOAT8:  # read as the bytes they are
            weight = weight.to(tl.float8e4nv, bitcast=True)
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
        elif SCALED:  # 8 bits, which every dtype of x holds exactly
            weight = weight.to(x.dtype.element_ty)
        total = tl.dot(weight, right, total, input_precision="tf32x3")
    if SCALED:
        total *= tl.load(scales + row, mask=row < rows, other=0)[:, None]
    store_tile(total, y, bias, row, token, rows, tokens, part, SPLIT, HAS_BIAS, ACTIVATION)


def nm_decode(x, values, index, shape, bias=None, activation="none", split=None, scales=None):
    """Compute act(x W^T + b) for at most 64 tokens of float32, float16 or bfloat16.

    Args:
        x: `(tokens, in)`.
        values: `(out, slots)`, as in `nm_linear`.
        index: `(out, bytes)` uint8, checked before.
        shape: `(out, in, n, m)`.
        bias: `(out,)` or None.
        activation: none, relu, gelu or gelu_tanh.
        split: Parts of each sum; by default what fills the device.
        scales: `(out,)` float32 for values of int8, or uint8 with the bits of float8 e4m3, which
            they multiply.

    Raises:
        RuntimeError: Too many tokens, or tensors that do not fit.
    """
    op = "nm_decode"
    rows, cols, n, m = shape
    check_linear(op, x, values if scales is None else x, bias, rows, activation, MAX_TOKENS)
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
    float8 = values.dtype == torch.uint8
    values = values.view(torch.int8) if float8 else values
    packed = (n, m) == (2, 4) and values.element_size() == 2 and slots % 4 == 0
    packed = packed and values.data_ptr() % 8 == 0
    chosen = settings(x.shape[0], n, m, packed)
    tiles = ceil_div(rows, chosen["ROWS"])
    steps = ceil_div(ceil_div(cols, m), chosen["GROUPS"])
    split = split or split_for(tiles, steps, x.device)

    def arguments(y):
        sizes = (rows, cols, x.shape[0], slots, index.shape[1], steps)
        return (x, values, scales, index, bias, y, *sizes), {
            **chosen,
            "SCALED": scales is not None,
            "FLOAT8": float8,
            "PACKED": packed,
            "UPCAST": INTERPRET,
        }

    return run_split(decode_kernel, tiles, split, x, rows, bias, activation, arguments)


def settings(tokens: int, n: int, m: int, packed: bool) -> dict:
    """Constants and warps of the kernel that keep its values in registers."""
    wide = power_of_two(m)
    depth = 32 if not packed else 128 if tokens <= 32 else 64
    tile = {"ROWS": 64, "GROUPS": depth // wide, "TOKENS": max(16, power_of_two(tokens))}
    pattern = {"N": n, "M": m, "WIDE": wide, "BITS": slot_bits(m), "PACKED": packed}
    return {**pattern, **tile, "num_warps": 4}
