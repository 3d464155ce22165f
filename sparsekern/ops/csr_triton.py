"""Triton kernels of CSR weights: few tokens from the decode plan, any tokens from int32 columns.

What `csr_cuda.py` calls; all tensors on one device, indices and plans as `csr_decode_plan.py` and
`check_indices` leave them. Shapes: x (tokens, in), values (nnz,), crow (out + 1,), col (nnz,),
bias (out,), result (tokens, out). Sums in float32 (float64 for float64), in a fixed order.

- `csr_decode_pack(crow, col, cols)`: the plan of a pattern, made once.
- `csr_decode(x, values, crow, col, plan, bias, activation)`: at most 64 tokens; three kernels:
  `narrow` (1 or 2 tokens) gives a lane eight neighbouring values, 16 bytes, and gathers x;
  `wide` (3 to 8, or weights too sparse for a bitmap) gives a lane one value and all tokens of it;
  `bitmap` (3 to 64) spreads values into dense tiles in registers for the tensor cores.
- `csr_spmm(x, values, crow, col, bias, activation)`: any number of tokens, any floating dtype.
- `csr_sddmm(grad, x, crow, col)`: the gradient of the values.

Nothing here but the packing waits for the device; outputs and scratch come from torch's allocator,
so all of it can be captured in a CUDA graph. Triton is imported with this module.
"""

import torch
import triton
import triton.language as tl

from .csr_decode_plan import CHUNK, csr_decode_pack, layout_of
from .decode_triton import (
    INTERPRET,
    activate,
    check_dtypes,
    check_linear,
    on_device,
    run_split,
    split_for,
    store_tile,
)

__all__ = ["csr_decode", "csr_decode_pack", "csr_sddmm", "csr_spmm"]

MAX_TOKENS = 64
# From 3 tokens on the bitmap kernel wins where its bytes and its work per dense weight are fewer
# than one 16-byte gather per nonzero costs; by the budget of bench/NOTES.md, not measured.
WIDE_DENSITY = 0.25
# Above this density a dense product and a gather take less time than a gather for each value.
DENSE_GRADIENT = 0.03


@triton.jit
def _run_columns(plan, chunk, inside, begin, COLUMNS_AT, BYTES: tl.constexpr):
    """Columns (chunks, 8) of whole runs of values."""
    at = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
    if BYTES:
        start = tl.load(plan.to(tl.pointer_type(tl.uint16)) + chunk, mask=inside, other=0)
        start = tl.where(chunk * 8 >= begin, start.to(tl.int32), 0)
        place = (plan + COLUMNS_AT * 4).to(tl.pointer_type(tl.uint8))
        distance = tl.load(place + at, mask=inside[:, None], other=0)
        return start[:, None] + distance.to(tl.int32)
    column = tl.load(plan.to(tl.pointer_type(tl.uint16)) + at, mask=inside[:, None], other=0)
    return column.to(tl.int32)


@triton.jit
def _products(x, value, column, kept):
    """value * x[column] in float32; 0 where not kept, whatever the value is."""
    right = tl.load(x + column, mask=kept, other=0).to(tl.float32)
    return tl.where(kept, value.to(tl.float32) * right, 0.0)


@triton.jit
def narrow_kernel(
    x, values, crow, plan, bias, y, nnz, cols, rows, columns_at,
    TOKENS: tl.constexpr, CHUNKS: tl.constexpr, BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One row of the weight times one or two tokens; CHUNKS runs of eight values a step."""
    row = tl.program_id(0)
    begin, end = tl.load(crow + row), tl.load(crow + row + 1)
    whole = nnz // 8  # the run that is not whole is read value by value
    last = tl.minimum((end + 7) // 8, whole)
    first_sum = tl.zeros((CHUNKS, 8), tl.float32)
    second_sum = tl.zeros((CHUNKS, 8), tl.float32)
    for step in range(begin // 8, last, CHUNKS):
        chunk = step + tl.arange(0, CHUNKS)
        inside = chunk < last
        item = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
        value = tl.load(values + item, mask=inside[:, None], other=0)
        column = _run_columns(plan, chunk, inside, begin, columns_at, BYTES)
        kept = (item >= begin) & (item < end) & inside[:, None]
        first_sum += _products(x, value, column, kept)
        if TOKENS == 2:
            second_sum += _products(x + cols, value, column, kept)
    if end > whole * 8:
        chunk = whole + tl.arange(0, CHUNKS)
        item = chunk[:, None] * 8 + tl.arange(0, 8)[None, :]
        kept = (item >= begin) & (item < end)
        value = tl.load(values + item, mask=kept, other=0)
        column = _run_columns(plan, chunk, chunk == whole, begin, columns_at, BYTES)
        first_sum += _products(x, value, column, kept)
        if TOKENS == 2:
            second_sum += _products(x + cols, value, column, kept)
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + row).to(tl.float32)
    tl.store(y + row, activate(tl.sum(tl.sum(first_sum, 1), 0) + b, ACTIVATION))
    if TOKENS == 2:
        total = tl.sum(tl.sum(second_sum, 1), 0) + b
        tl.store(y + rows + row, activate(total, ACTIVATION))


@triton.jit
def wide_kernel(
    x_t, values, crow, plan, bias, y, rows, tokens, stride, columns_at,
    TOKENS: tl.constexpr, ITEMS: tl.constexpr, BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One row of the weight times TOKENS tokens; x_t (in, stride) holds the tokens of a column."""
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    begin, end = tl.load(crow + row), tl.load(crow + row + 1)
    total = tl.zeros((ITEMS, TOKENS), tl.float32)
    for step in range(begin, end, ITEMS):
        item = step + tl.arange(0, ITEMS)
        kept = item < end
        value = tl.load(values + item, mask=kept, other=0).to(tl.float32)
        if BYTES:
            run = item // 8
            start = tl.load(plan.to(tl.pointer_type(tl.uint16)) + run, mask=kept, other=0)
            place = (plan + columns_at * 4).to(tl.pointer_type(tl.uint8))
            column = tl.load(place + item, mask=kept, other=0).to(tl.int32)
            column += tl.where(run * 8 >= begin, start.to(tl.int32), 0)
        else:
            place = plan.to(tl.pointer_type(tl.uint16))
            column = tl.load(place + item, mask=kept, other=0).to(tl.int32)
        at = x_t + (column * stride)[:, None] + token[None, :]
        right = tl.load(at, mask=kept[:, None], other=0).to(tl.float32)
        total += value[:, None] * right
    result = tl.sum(total, 0)
    if HAS_BIAS:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(y + token * rows + row, activate(result, ACTIVATION), mask=token < tokens)


@triton.jit
def _popcount(word):
    """Bits that are set; LLVM makes one `popc` of it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def _next_value(values, at, bits, BIT: tl.constexpr):
    """The value of a bit, 0 where it is not set, and where the next one is."""
    bit = (bits >> BIT) & 1
    return tl.load(values + at, mask=bit != 0, other=0), at + bit.to(tl.int32)


@triton.jit
def _spread(values, at, bits):
    """Values (rows, bytes) at the places `at`, spread to (rows, bytes, 8) by the low eight bits."""
    v0, at = _next_value(values, at, bits, 0)
    v1, at = _next_value(values, at, bits, 1)
    v2, at = _next_value(values, at, bits, 2)
    v3, at = _next_value(values, at, bits, 3)
    v4, at = _next_value(values, at, bits, 4)
    v5, at = _next_value(values, at, bits, 5)
    v6, at = _next_value(values, at, bits, 6)
    v7, at = _next_value(values, at, bits, 7)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))  # the last of the joins varies slowest: 4, 2
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(even, odd)  # (rows, bytes, 2, 2, 2): 4s, 2s, 1s


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
        weight = tl.reshape(_spread(values, first, word >> shift), (ROWS, 8 * BYTES))
        column = step * (8 * BYTES) + tl.arange(0, 8 * BYTES)
        here = (column < cols)[:, None] & (token < tokens)[None, :]
        right = tl.load(x + token[None, :] * cols + column[:, None], mask=here, other=0)
        if UPCAST:
            weight, right = weight.to(tl.float32), right.to(tl.float32)
        total = tl.dot(weight, right, total, input_precision="ieee")
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
    """y = act(x W^T + b) for at most 64 tokens of float32, float16 or bfloat16.

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
            x, values, crow, plan, bias, y, values.numel(), cols, rows, layout.columns // 4,
            TOKENS=tokens, CHUNKS=32 * warps, BYTES=layout.bytes, HAS_BIAS=bias is not None,
            ACTIVATION=activation, num_warps=warps,
        )  # fmt: skip
    return y


def _wide(x, values, crow, plan, layout, bias, activation):
    rows, tokens = crow.numel() - 1, x.shape[0]
    block = 4 if tokens <= 4 else 8
    x_t = torch.nn.functional.pad(x, (0, 0, 0, -tokens % block)).t().contiguous()
    y = x.new_empty((tokens, rows))
    with on_device(x):
        wide_kernel[(rows, x_t.shape[1] // block)](
            x_t, values, crow, plan, bias, y, rows, tokens, x_t.shape[1], layout.columns // 4,
            TOKENS=block, ITEMS=128, BYTES=layout.bytes, HAS_BIAS=bias is not None,
            ACTIVATION=activation, num_warps=1 if rows >= 4096 else 2,
        )  # fmt: skip
    return y


def _bitmap(x, values, crow, plan, layout, bias, activation, split=None):
    x = x.contiguous()
    rows, (tokens, cols) = crow.numel() - 1, x.shape
    block, columns = 64, 128
    tiles, steps = triton.cdiv(rows, block), triton.cdiv(cols, columns)
    split = split or split_for(tiles, steps, x.device)

    def arguments(y):
        sizes = (rows, cols, tokens, steps, layout.words // 4, layout.prefix // 4)
        named = {"ROWS": block, "BYTES": columns // CHUNK, "UPCAST": INTERPRET}
        named["TOKENS"] = max(16, triton.next_power_of_2(tokens))
        return (x, values, crow, plan, bias, y, *sizes), {**named, "num_warps": 4}

    return run_split(bitmap_kernel, tiles, split, x, rows, bias, activation, arguments)


def csr_spmm(x, values, crow, col, bias=None, activation="none"):
    """y = act(x W^T + b) for any number of tokens, of float16, bfloat16, float32 or float64.

    Raises:
        RuntimeError: Tensors that do not fit.
    """
    rows = crow.numel() - 1
    check_linear("csr_spmm", x, values, bias, rows, activation)
    y = x.new_empty((x.shape[0], rows))
    if y.numel() == 0:
        return y
    block = min(128, triton.next_power_of_2(x.shape[0]))
    with on_device(x):
        spmm_kernel[(rows, triton.cdiv(x.shape[0], block))](
            x.t().contiguous(), values, crow, col, bias, y, rows, x.shape[0],
            TOKENS=block, ITEMS=max(8, 256 // block), SUM=_sum_type(x),
            HAS_BIAS=bias is not None, ACTIVATION=activation, num_warps=1,
        )  # fmt: skip
    return y


def csr_sddmm(grad, x, crow, col):
    """The gradient (nnz,) of the values: grad (tokens, out) times x (tokens, in) where W is stored.

    A dense product and a gather above 3 % density, as the tensor cores then win; a dot product for
    each value below.

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
    if nnz > DENSE_GRADIENT * rows * x.shape[1]:
        row = torch.repeat_interleave(
            torch.arange(rows, device=x.device), crow.diff().long(), output_size=nnz
        )
        return (grad.t() @ x)[row, col.long()]
    values = x.new_zeros(nnz) if tokens == 0 else x.new_empty(nnz)
    if 0 in (tokens, nnz):
        return values
    with on_device(x):
        sddmm_kernel[(rows,)](
            grad.t().contiguous(), x.t().contiguous(), crow, col, values, tokens,
            TOKENS=min(128, triton.next_power_of_2(tokens)), ITEMS=8, SUM=_sum_type(x),
            num_warps=1,
        )  # fmt: skip
    return values


def _sum_type(x: torch.Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32
