"""Triton kernels of CSR weights: few tokens from the decode plan, any tokens from int32 columns.

What `csr_cuda.py` calls; all tensors on one device, indices and plans as `csr_decode_plan.py` and
`check_indices` leave them. Shapes: x (tokens, in), values (nnz,), crow (out + 1,), col (nnz,),
bias (out,), result (tokens, out). Sums in float32 (float64 for float64), in a fixed order.

`csr_decode`, for at most 64 tokens, has three kernels:
- `narrow` (1 or 2 tokens) gives a lane eight neighbouring values, 16 bytes, and gathers x;
- `wide` (3 to 8, or weights too sparse for a bitmap) gives a lane one value and all tokens of it;
- `bitmap` (3 to 64) spreads values into dense tiles in registers for the tensor cores.
  As in a dense layer, an infinite or NaN input then also reaches outputs that do not store its
  weight (0 * inf); in the other kernels it does not.

Nothing but the packing waits for the device, and all memory comes from torch's allocator: it can be
captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from .csr_decode_plan import layout_of
from .cuda_support import ceil_div, power_of_two
from .decode_triton import (
    INTERPRET,
    activate,
    check_dtypes,
    check_linear,
    on_device,
    run_split,
    split_for,
    store_tile,
    sum_type,
)

MAX_TOKENS = 64
# From 3 tokens on the bitmap kernel wins where its bytes and its work per dense weight are fewer
# than one 16-byte gather per nonzero costs; by the budget of bench/NOTES.md, not measured.
WIDE_DENSITY = 0.25


@triton.jit
def _start_of_x(x, plan, run, inside, begin, BYTES: tl.constexpr):
    """Where in x the distances of a run of eight values start."""
    if BYTES:
        start = tl.load(plan.to(tl.pointer_type(tl.uint16)) + run, mask=inside, other=0)
        start = tl.where(run * 8 >= begin, start.to(tl.int32), 0)
    else:
        start = tl.zeros(run.shape, tl.int32)
    return x + start


@triton.jit
def _distances(plan, columns_at, BYTES: tl.constexpr):
    """Where the distances (or the columns, which are distances from 0) of all values are."""
    if BYTES:
        place = (plan + columns_at * 4).to(tl.pointer_type(tl.uint8))
    else:
        place = plan.to(tl.pointer_type(tl.uint16))
    return place


@triton.jit
def _products(x, values, distances, item, kept):
    """Products values[item] * x[distances[item]] in float32; 0 where not kept."""
    left = tl.load(values + item, mask=kept, other=0).to(tl.float32)
    right = tl.load(
        x + tl.load(distances + item, mask=kept, other=0).to(tl.int32), mask=kept, other=0
    )
    return left * right.to(tl.float32)


@triton.jit
def _edges(begin, end):
    """The two runs that a row shares with its neighbours, their items, and which are of the row."""
    first, last = (begin + 7) // 8, end // 8
    edge = tl.arange(0, 2)
    run = tl.where(edge == 0, begin // 8, last)
    low = tl.where(edge == 0, begin, tl.maximum(first, last) * 8)
    high = tl.where(edge == 0, tl.minimum(first * 8, end), end)
    item = run[:, None] * 8 + tl.arange(0, 8)[None, :]
    return run, low < high, item, (item >= low[:, None]) & (item < high[:, None])


@triton.jit
def narrow_kernel(
    x, values, crow, plan, bias, y, cols, rows, columns_at,
    TOKENS: tl.constexpr, RUNS: tl.constexpr, BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One row of the weight times one or two tokens; RUNS runs of eight values a step.

    Runs that lie in the row need no test of single values; the two that it shares do.
    """
    row = tl.program_id(0)
    begin, end = tl.load(crow + row), tl.load(crow + row + 1)
    distances = _distances(plan, columns_at, BYTES)
    edge_run, touched, edge_item, kept = _edges(begin, end)
    edge = _start_of_x(x, plan, edge_run, touched, begin, BYTES)[:, None]
    one = tl.sum(tl.sum(_products(edge, values, distances, edge_item, kept), 1), 0)
    if TOKENS == 2:
        two = tl.sum(tl.sum(_products(edge + cols, values, distances, edge_item, kept), 1), 0)
        sums_two = tl.zeros((RUNS, 8), tl.float32)
    sums = tl.zeros((RUNS, 8), tl.float32)
    last = end // 8
    for step in range((begin + 7) // 8, last, RUNS):
        run = step + tl.arange(0, RUNS)
        inside = run < last
        item = run[:, None] * 8 + tl.arange(0, 8)[None, :]
        start = _start_of_x(x, plan, run, inside, begin, BYTES)[:, None]
        sums += _products(start, values, distances, item, inside[:, None])
        if TOKENS == 2:
            sums_two += _products(start + cols, values, distances, item, inside[:, None])
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + row).to(tl.float32)
    one += tl.sum(tl.sum(sums, 1), 0)
    tl.store(y + row, activate(one + b, ACTIVATION))
    if TOKENS == 2:
        two += tl.sum(tl.sum(sums_two, 1), 0)
        tl.store(y + rows + row, activate(two + b, ACTIVATION))


@triton.jit
def wide_kernel(
    x_t, values, crow, plan, bias, y, rows, cols, tokens, columns_at,
    TOKENS: tl.constexpr, ITEMS: tl.constexpr, BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One row of the weight times TOKENS tokens; x_t (tiles of tokens, in, TOKENS)."""
    row = tl.program_id(0)
    place = tl.arange(0, TOKENS)
    begin, end = tl.load(crow + row), tl.load(crow + row + 1)
    distances = _distances(plan, columns_at, BYTES)
    x_t += tl.program_id(1).to(tl.int64) * cols * TOKENS
    total = tl.zeros((ITEMS, TOKENS), tl.float32)
    for step in range(begin, end, ITEMS):
        item = step + tl.arange(0, ITEMS)
        kept = item < end
        value = tl.load(values + item, mask=kept, other=0).to(tl.float32)
        column = tl.load(distances + item, mask=kept, other=0).to(tl.int32)
        if BYTES:
            run = item // 8
            start = tl.load(plan.to(tl.pointer_type(tl.uint16)) + run, mask=kept, other=0)
            column += tl.where(run * 8 >= begin, start.to(tl.int32), 0)
        at = x_t + column[:, None] * TOKENS + place[None, :]
        right = tl.load(at, mask=kept[:, None], other=0).to(tl.float32)
        total += value[:, None] * right
    result = tl.sum(total, 0)
    if HAS_BIAS:
        result += tl.load(bias + row).to(tl.float32)
    token = tl.program_id(1) * TOKENS + place
    tl.store(y + token * rows + row, activate(result, ACTIVATION), mask=token < tokens)


@triton.jit
def _popcount(word):
    """Bits that are set; LLVM makes one `popc` of it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def _bit_value(place, nibbles, ranks, BIT: tl.constexpr):
    """The value of a bit, 0 where it is not set."""
    kept = (nibbles & (1 << 4 * BIT)) != 0
    rank = ((ranks >> 4 * BIT) & 15).to(tl.int32)
    return tl.load(place + rank, mask=kept, other=0)


@triton.jit
def _spread(place, byte):
    """Values (rows, bytes) from `place` on, spread to (rows, bytes, 2, 2, 2) by the bits of a byte.

    Bits go to a nibble each; a product with 0x11111110 then puts into each nibble how many bits
    are set before it (at most 7, so nothing carries).
    """
    nibbles = (byte | (byte << 12)) & 0x000F000F
    nibbles = (nibbles | (nibbles << 6)) & 0x03030303
    nibbles = (nibbles | (nibbles << 3)) & 0x11111111
    ranks = nibbles * 0x11111110
    v0 = _bit_value(place, nibbles, ranks, 0)
    v1 = _bit_value(place, nibbles, ranks, 1)
    v2 = _bit_value(place, nibbles, ranks, 2)
    v3 = _bit_value(place, nibbles, ranks, 3)
    v4 = _bit_value(place, nibbles, ranks, 4)
    v5 = _bit_value(place, nibbles, ranks, 5)
    v6 = _bit_value(place, nibbles, ranks, 6)
    v7 = _bit_value(place, nibbles, ranks, 7)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))  # the innermost join varies slowest
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(even, odd)


@triton.jit
def bitmap_kernel(
    x, values, crow, plan, bias, y, rows, cols, tokens, steps, words_at, prefix_at,
    ROWS: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight times all tokens, 8 * BYTES columns a step.

    A lane takes a byte of the bitmap: the first value is where the count of the word and the bits
    below say, the other seven follow. Steps are dealt out to SPLIT programs in runs.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    begin = tl.load(crow + row, mask=row < rows, other=0)
    width = (cols + 31) // 32
    words = (plan + words_at * 4).to(tl.pointer_type(tl.uint32))
    prefix = (plan + prefix_at * 4).to(tl.pointer_type(tl.uint16))
    share = (steps + SPLIT - 1) // SPLIT
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        byte = step * BYTES + tl.arange(0, BYTES)
        inside = (row < rows)[:, None] & (byte < 4 * width)[None, :]
        at = row.to(tl.int64)[:, None] * width + (byte // 4)[None, :]
        word = tl.load(words + at, mask=inside, other=0)
        before = tl.load(prefix + at, mask=inside, other=0).to(tl.int32)
        shift = ((byte % 4) * 8).to(tl.uint32)[None, :]
        below = word & ((tl.full((1, 1), 1, tl.uint32) << shift) - 1)
        first = begin[:, None] + before + _popcount(below).to(tl.int32)
        weight = tl.reshape(_spread(values + first, (word >> shift) & 255), (ROWS, 8 * BYTES))
        column = step * (8 * BYTES) + tl.arange(0, 8 * BYTES)
        here = (column < cols)[:, None] & (token < tokens)[None, :]
        right = tl.load(x + token[None, :] * cols + column[:, None], mask=here, other=0)
        if UPCAST:
            weight, right = weight.to(tl.float32), right.to(tl.float32)
        total = tl.dot(weight, right, total, input_precision="tf32x3")
    store_tile(total, y, bias, row, token, rows, tokens, part, SPLIT, HAS_BIAS, ACTIVATION)


@triton.jit
def spmm_kernel(
    x_t, values, crow, col, bias, y, rows, tokens,
    TOKENS: tl.constexpr, ITEMS: tl.constexpr, SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One row of the weight times TOKENS tokens; x_t (in, tokens), sums of dtype SUM."""
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    begin, end = tl.load(crow + row), tl.load(crow + row + 1)
    total = tl.zeros((TOKENS,), SUM)
    for step in range(begin, end, ITEMS):
        item = step + tl.arange(0, ITEMS)
        kept = item < end
        value = tl.load(values + item, mask=kept, other=0).to(SUM)
        column = tl.load(col + item, mask=kept, other=0).to(tl.int64)
        here = kept[:, None] & (token < tokens)[None, :]
        right = tl.load(x_t + (column * tokens)[:, None] + token[None, :], mask=here, other=0)
        total += tl.sum(value[:, None] * right.to(SUM), 0)
    if HAS_BIAS:
        total += tl.load(bias + row).to(SUM)
    at = y + token.to(tl.int64) * rows + row
    tl.store(at, activate(total, ACTIVATION), mask=token < tokens)


@triton.jit
def sddmm_kernel(
    grad_t, x_t, crow, col, grad_values, tokens,
    TOKENS: tl.constexpr, ITEMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One row: grad_values[i] = sum over tokens of grad_t (out, tokens) times x_t (in, tokens)."""
    row = tl.program_id(0)
    begin, end = tl.load(crow + row), tl.load(crow + row + 1)
    left_row = grad_t + row.to(tl.int64) * tokens
    for step in range(begin, end, ITEMS):
        item = step + tl.arange(0, ITEMS)
        kept = item < end
        column = tl.load(col + item, mask=kept, other=0).to(tl.int64)
        total = tl.zeros((ITEMS, TOKENS), SUM)
        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            left = tl.load(left_row + token, mask=token < tokens, other=0).to(SUM)
            here = kept[:, None] & (token < tokens)[None, :]
            right = tl.load(x_t + (column * tokens)[:, None] + token[None, :], mask=here, other=0)
            total += left[None, :] * right.to(SUM)
        tl.store(grad_values + item, tl.sum(total, 1), mask=kept)


def csr_decode(x, values, crow, col, plan, bias=None, activation="none"):
    """Compute act(x W^T + b) for at most 64 tokens of float32, float16 or bfloat16.

    Raises:
        RuntimeError: Too many tokens, a foreign plan, or tensors that do not fit.
    """
    rows, cols = crow.numel() - 1, x.shape[-1]
    check_linear("csr_decode", x, values, bias, rows, activation, MAX_TOKENS)
    tokens = x.shape[0]
    if plan.numel() == 0 or x.dtype == torch.float64 or 0 in (tokens, rows, cols):
        return csr_spmm(x, values, crow, col, bias, activation)
    layout = layout_of(plan, rows, cols, values.numel())
    dense = layout.bitmap and values.numel() > WIDE_DENSITY * rows * cols
    if tokens <= 2:
        return _narrow(x, values, crow, plan, layout, bias, activation)
    if dense or (layout.bitmap and tokens > 8):
        return _bitmap(x, values, crow, plan, layout, bias, activation)
    return _wide(x, values, crow, plan, layout, bias, activation)


def _narrow(x, values, crow, plan, layout, bias, activation):
    x = x.contiguous()
    rows, (tokens, cols) = crow.numel() - 1, x.shape
    # One warp a row fills the device with 4096 rows; fewer rows get more warps each.
    warps = 1 if rows >= 4096 else 2 if rows >= 2048 else 4
    y = x.new_empty((tokens, rows))
    with on_device(x):
        narrow_kernel[(rows,)](
            x, values, crow, plan, bias, y, cols, rows, layout.columns // 4,
            TOKENS=tokens, RUNS=32 * warps, BYTES=layout.bytes, HAS_BIAS=bias is not None,
            ACTIVATION=activation, num_warps=warps,
        )  # fmt: skip
    return y


def _wide(x, values, crow, plan, layout, bias, activation):
    rows, (tokens, cols) = crow.numel() - 1, x.shape
    block = 4 if tokens <= 4 else 8
    x_t = torch.nn.functional.pad(x, (0, 0, 0, -tokens % block)).unflatten(0, (-1, block))
    y = x.new_empty((tokens, rows))
    with on_device(x):
        wide_kernel[(rows, x_t.shape[0])](
            x_t.transpose(1, 2).contiguous(), values, crow, plan, bias, y, rows, cols, tokens,
            layout.columns // 4, TOKENS=block, ITEMS=128, BYTES=layout.bytes,
            HAS_BIAS=bias is not None, ACTIVATION=activation, num_warps=1 if rows >= 4096 else 2,
        )  # fmt: skip
    return y


def _bitmap(x, values, crow, plan, layout, bias, activation, split=None):
    x = x.contiguous()
    rows, (tokens, cols) = crow.numel() - 1, x.shape
    settings = bitmap_settings(tokens, x.element_size())
    tiles, steps = ceil_div(rows, settings["ROWS"]), ceil_div(cols, 8 * settings["BYTES"])
    split = split or split_for(tiles, steps, x.device)

    def arguments(y):
        sizes = (rows, cols, tokens, steps, layout.words // 4, layout.prefix // 4)
        return (x, values, crow, plan, bias, y, *sizes), {**settings, "UPCAST": INTERPRET}

    return run_split(bitmap_kernel, tiles, split, x, rows, bias, activation, arguments)


def bitmap_settings(tokens: int, itemsize: int) -> dict:
    """Tile and warps of the bitmap kernel that keep its values in registers."""
    bytes = 16 if itemsize == 2 and tokens <= 32 else 8
    tile = {"ROWS": 64, "BYTES": bytes, "TOKENS": max(16, power_of_two(tokens))}
    return {**tile, "num_warps": 4}


def csr_spmm(x, values, crow, col, bias=None, activation="none"):
    """Compute act(x W^T + b) for any number of tokens, of float16, bfloat16, float32 or float64.

    Raises:
        RuntimeError: Tensors that do not fit.
    """
    rows = crow.numel() - 1
    check_linear("csr_spmm", x, values, bias, rows, activation)
    y = x.new_empty((x.shape[0], rows))
    if y.numel() == 0:
        return y
    block = min(128, power_of_two(x.shape[0]))
    with on_device(x):
        spmm_kernel[(rows, ceil_div(x.shape[0], block))](
            x.t().contiguous(), values, crow, col, bias, y, rows, x.shape[0],
            TOKENS=block, ITEMS=max(8, 256 // block), SUM=sum_type(x),
            HAS_BIAS=bias is not None, ACTIVATION=activation, num_warps=1,
        )  # fmt: skip
    return y


def csr_sddmm(grad, x, crow, col):
    """The gradient (nnz,) of the values: grad (tokens, out) times x (tokens, in) where W is stored.

    One dot product for each value. With many values a dense product on the tensor cores and a
    gather take less time; the caller chooses.

    Raises:
        RuntimeError: grad or x that do not fit.
    """
    check_dtypes("csr_sddmm", x, grad=grad)
    rows = crow.numel() - 1
    if grad.shape != (x.shape[0], rows):
        raise RuntimeError(
            f"csr_sddmm: expected grad of shape ({x.shape[0]}, {rows}), got {tuple(grad.shape)}"
        )
    tokens, nnz = x.shape[0], col.numel()
    values = x.new_zeros(nnz) if tokens == 0 else x.new_empty(nnz)
    if 0 in (tokens, nnz):
        return values
    with on_device(x):
        sddmm_kernel[(rows,)](
            grad.t().contiguous(), x.t().contiguous(), crow, col, values, tokens,
            TOKENS=min(128, power_of_two(tokens)), ITEMS=8, SUM=sum_type(x),
            num_warps=1,
        )  # fmt: skip
    return values
