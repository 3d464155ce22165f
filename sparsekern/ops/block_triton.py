"""Triton kernels of block weights: the product, both its directions, and the weight gradient.

`spmm` computes y (T, outer) = act(x (T, inner) W^T + b) from blocks, in either direction of the
weight, so it serves the forward pass and the input gradient. `sddmm` computes the dense products
grad^T x only where blocks are. Nothing here waits for the device or reads back from it.

Tokens are the M dimension of the tensor core tile, so that a block of any height is its N
dimension. The loop over a row of blocks is a dense product that skips what is not stored: block
columns are read one step ahead of the tiles they address. Rows of blocks come in falling order of
their counts (longest processing time first; Graham 1969), and where rows times tokens cannot fill
the device each row is cut in parts that a second kernel adds up, always in the same order.

This module imports Triton; nothing but a call with CUDA tensors imports this module.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .block_tuning import GradConfig, SpmmConfig, grad_config, precision, with_split
from .cuda_support import ceil_div, power_of_two
from .decode_triton import INTERPRET, activate, multiprocessors


class Index(NamedTuple):
    """Where blocks lie, in one direction of the weight; all int32.

    Attributes:
        crow: `(rows + 1,)`, where each row of blocks starts in `col`.
        col: `(n_blocks,)`, the column of each block.
        slot: `(n_blocks,)`, the place of each block in the values; None if they are in order.
        order: `(rows,)`, the rows in the order in which they are handed out.
    """

    crow: torch.Tensor
    col: torch.Tensor
    slot: torch.Tensor | None
    order: torch.Tensor


@triton.jit
def place_of(
    col, slot, start, end, step, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SLOT: tl.constexpr
):
    """Column and place in the values of the block (or blocks) that a step of the loop reads.

    Steps are BLOCK_K deep. A block is DEPTH (a power of two) deep; if that is less, a step takes
    several blocks and the result holds one entry for each depth. Past the end both are 0.
    """
    if BLOCK_K > DEPTH:
        at = start + step * (BLOCK_K // DEPTH) + tl.arange(0, BLOCK_K) // DEPTH
    else:
        at = start + step // (DEPTH // BLOCK_K)
    column = tl.load(col + at, mask=at < end, other=0)
    if HAS_SLOT:
        place = tl.load(slot + at, mask=at < end, other=0)
    else:
        place = at
    return column, place


@triton.jit(do_not_specialize=["tokens", "rows"])
def spmm_kernel(
    x, values, crow, col, slot, order, bias, y, tokens, inner, outer, rows, x_stride,
    HEIGHT: tl.constexpr, DEPTH: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PADDED: tl.constexpr,
    SPLIT: tl.constexpr, RAGGED: tl.constexpr, HAS_SLOT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_T tokens x BLOCK_N outputs of a row of blocks, summed over its blocks.

    A block is HEIGHT outputs x DEPTH inputs, PADDED is DEPTH as a power of two. With SPLIT > 1 the
    parts of a row go to y (SPLIT, tokens, outer), which must be float32. With TMA, x and values are
    descriptors; the pointer version and this one differ in the two loads only.
    """
    token_tiles = tl.cdiv(tokens, BLOCK_T)
    parts: tl.constexpr = SPLIT * ((HEIGHT + BLOCK_N - 1) // BLOCK_N)
    for tile in range(tl.program_id(0), token_tiles * rows * parts, tl.num_programs(0)):
        first_token = (tile % token_tiles) * BLOCK_T
        part = (tile // token_tiles) % parts
        row = tl.load(order + tile // token_tiles // parts)
        start, end = tl.load(crow + row), tl.load(crow + row + 1)
        if BLOCK_K > PADDED:
            steps = tl.cdiv(end - start, BLOCK_K // PADDED)
        else:
            steps = (end - start) * (PADDED // BLOCK_K)
        first, last = 0, steps
        if SPLIT > 1:
            share = tl.cdiv(steps, SPLIT)
            first = (part % SPLIT) * share
            last = tl.minimum(first + share, steps)
        token = first_token + tl.arange(0, BLOCK_T)
        height = (part // SPLIT) * BLOCK_N + tl.arange(0, BLOCK_N)
        deep = tl.arange(0, BLOCK_K)
        if not TMA:  # rows past the last token read it again and are not stored
            x_rows = x + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * x_stride
        total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        column, place = place_of(col, slot, start, end, first, PADDED, BLOCK_K, HAS_SLOT)
        for step in range(first, last):
            next_column, next_place = place_of(
                col, slot, start, end, step + 1, PADDED, BLOCK_K, HAS_SLOT
            )
            if TMA:
                at = (step % (PADDED // BLOCK_K)) * BLOCK_K
                left = x.load([first_token, column * DEPTH + at])
                if STRIDE_K == 1:
                    right = values.load([place * HEIGHT + (part // SPLIT) * BLOCK_N, at]).T
                else:
                    right = values.load([place * DEPTH + at, (part // SPLIT) * BLOCK_N])
            else:
                if BLOCK_K > PADDED:
                    depth = deep % PADDED
                    stored = start + step * (BLOCK_K // PADDED) + deep // PADDED < end
                else:
                    depth = (step % (PADDED // BLOCK_K)) * BLOCK_K + deep
                    stored = depth < PADDED
                channel = column * DEPTH + depth
                if BLOCK_K > PADDED and PADDED == DEPTH:  # runs that 16-byte loads may take
                    channel = tl.max_contiguous(tl.multiple_of(channel, DEPTH), DEPTH)
                block = values + place.to(tl.int64) * (HEIGHT * DEPTH) + depth * STRIDE_K
                block = block[:, None] + height[None, :] * STRIDE_N
                if PADDED != DEPTH:
                    stored = stored & (depth < DEPTH)
                if RAGGED:
                    stored = stored & (channel < inner)
                if RAGGED or PADDED != DEPTH or BLOCK_K > PADDED:
                    # zeros on both sides: beyond the edge may be anything
                    left = tl.load(x_rows + channel[None, :], mask=stored[None, :], other=0.0)
                    mask = stored[:, None] & (height[None, :] < HEIGHT)
                    right = tl.load(block, mask=mask, other=0.0)
                else:
                    left = tl.load(x_rows + channel[None, :])
                    right = tl.load(block, mask=height[None, :] < HEIGHT, other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            column, place = next_column, next_place
        output = row * HEIGHT + height
        inside = (height < HEIGHT) & (output < outer)
        if HAS_BIAS:
            total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
        total = activate(total, ACTIVATION)
        to = (part % SPLIT).to(tl.int64) * tokens + token
        y_tile = y + to[:, None] * outer + output[None, :]
        mask = (token < tokens)[:, None] & inside[None, :]
        tl.store(y_tile, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "count"])
def sddmm_kernel(
    grad, x, crow, col, row_of, chunks, out, tokens, inner, outer, count, grad_stride, x_stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, SPLIT: tl.constexpr, RAGGED_R: tl.constexpr,
    RAGGED_C: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows x BLOCK_C columns of a chunk of blocks of one row: grad^T x over all tokens.

    A chunk is max(1, BLOCK_C / PADDED) blocks, PADDED is WIDTH as a power of two. With SPLIT > 1
    the tokens are cut in parts and out is (SPLIT, count), which must be float32.
    """
    split, row_part = tl.program_id(1) % SPLIT, tl.program_id(1) // SPLIT
    first = tl.load(chunks + tl.program_id(0))
    row = tl.load(row_of + first)
    wide = tl.arange(0, BLOCK_C)
    block = first + wide // PADDED
    width = wide % PADDED
    if BLOCK_C < PADDED:
        width = tl.program_id(2) * BLOCK_C + wide
    stored = block < tl.load(crow + row + 1)
    if PADDED != WIDTH:
        stored = stored & (width < WIDTH)
    channel = tl.load(col + block, mask=stored, other=0) * WIDTH + width
    height = row_part * BLOCK_R + tl.arange(0, BLOCK_R)
    output = row * HEIGHT + height
    # Comparisons that hold everywhere are left out: they would cut the loads in pieces.
    in_rows, in_cols = height < HEIGHT, stored
    if RAGGED_R:
        in_rows = in_rows & (output < outer)
    if RAGGED_C:
        in_cols = in_cols & (channel < inner)
    elif PADDED == WIDTH:
        channel = tl.max_contiguous(tl.multiple_of(channel, WIDTH), WIDTH)
    share = tl.cdiv(tl.cdiv(tokens, SPLIT), BLOCK_T) * BLOCK_T
    end = tl.minimum((split + 1) * share, tokens)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for begin in range(split * share, end, BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        here = (token < end)[:, None]
        token = token.to(tl.int64)[:, None]
        left = grad + token * grad_stride + output[None, :]
        left = tl.load(left, mask=here & in_rows[None, :], other=0.0)
        right = x + token * x_stride + channel[None, :]
        right = tl.load(right, mask=here & in_cols[None, :], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    inside = in_rows[:, None] & in_cols[None, :]
    total = tl.where(inside, total, 0.0)  # beyond the edge NaN * 0 could be left
    to = split.to(tl.int64) * count + block.to(tl.int64) * (HEIGHT * WIDTH) + width
    out_tile = out + to[None, :] + height[:, None] * WIDTH
    mask = (height < HEIGHT)[:, None] & stored[None, :]
    tl.store(out_tile, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def reduce_kernel(
    parts, bias, y, count, outer, inner,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Y (count,) = act(sum of parts (SPLIT, count) + bias); y is (..., outer, inner)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(SPLIT):
        total += tl.load(parts + part * count.to(tl.int64) + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at // inner % outer, mask=inside, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands must be converted first: the interpreter holds bfloat16 as integers."""
    return INTERPRET and dtype == torch.bfloat16


def reduce_parts(parts, y, bias, activation, inner: int = 1) -> None:
    """Y = act(sum of parts (split, ...) + bias), where y is (..., outer, inner) in memory."""
    count, block, outer = y.numel(), 1024, 1 if bias is None else bias.numel()
    reduce_kernel[(ceil_div(count, block),)](
        parts, bias, y, count, outer, inner,
        SPLIT=parts.shape[0], HAS_BIAS=bias is not None, ACTIVATION=activation, BLOCK=block,
    )  # fmt: skip


def spmm(x, values, index: Index, bias, outer: int, activation: str, config: SpmmConfig):
    """Y (T, outer) = act(x (T, inner) W^T + b), on the current device.

    Args:
        x: `(T, inner)`, float16, bfloat16 or float32; rows may lie apart.
        values: `(n_blocks, R, C)`, contiguous, of the same dtype.
        index: Of W; of its transpose (columns of blocks, with `slot`) to multiply by W^T instead.
        bias: `(outer,)` or None.
        outer: Outputs.
        activation: none, relu, relu6, gelu or gelu_tanh.
        config: See `block_tuning.candidates`.
    """
    (tokens, inner), (height, depth) = x.shape, values.shape[1:]
    transposed = index.slot is not None
    if transposed:
        height, depth = depth, height
    y = x.new_empty(tokens, outer)
    if y.numel() == 0:
        return y
    rows, processors = index.order.numel(), multiprocessors(x.device)
    config = with_split(config, tokens, values.shape[0], rows, (height, depth), processors)
    split = config.split
    to = x.new_empty(split, tokens, outer, dtype=torch.float32) if split > 1 else y
    tiles = ceil_div(tokens, config.tokens) * rows * ceil_div(height, config.height) * split
    waves = config.persistent * processors
    operands = _descriptors(x, values, config, transposed) if config.tma else (x, values)
    now = (bias, activation) if split == 1 else (None, "none")  # else when the parts are summed
    spmm_kernel[(min(tiles, waves) if waves else tiles,)](
        *operands, *index, now[0], to, tokens, inner, outer, rows, x.stride(0),
        **spmm_constants(config, height, depth, transposed, inner % depth != 0, x.dtype),
        HAS_BIAS=now[0] is not None, ACTIVATION=now[1],
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split > 1:
        reduce_parts(to, y, bias, activation)
    return y


def spmm_constants(config: SpmmConfig, height, depth, transposed, ragged, dtype) -> dict:
    """The constants of `spmm_kernel` that follow from a config and from blocks height x depth."""
    return {
        "HEIGHT": height,
        "DEPTH": depth,
        "STRIDE_N": 1 if transposed else depth,
        "STRIDE_K": height if transposed else 1,
        "BLOCK_T": config.tokens,
        "BLOCK_N": config.height,
        "BLOCK_K": config.depth,
        "PADDED": power_of_two(depth),
        "SPLIT": config.split,
        "RAGGED": ragged,
        "HAS_SLOT": transposed,
        "PRECISION": precision(dtype),
        "UPCAST": upcast(dtype),
        "TMA": config.tma,
    }


def _descriptors(x, values, config: SpmmConfig, transposed: bool):
    """Host descriptors of x and of the values as one tall matrix, for the copy engine."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tile = [config.depth, config.height] if transposed else [config.height, config.depth]
    return (
        TensorDescriptor.from_tensor(x, [config.tokens, config.depth]),
        TensorDescriptor.from_tensor(values.flatten(0, 1), tile),
    )


def sddmm(grad, x, index, block, config: GradConfig | None = None):
    """The gradient (n_blocks, R, C) of the values: grad (T, outer)^T x (T, inner) where blocks are.

    `index` is (crow, col, row of each block, first block of each chunk); a chunk is
    `chunk_blocks(C)` blocks of one row, or what is left of it. Runs on the current device.
    """
    crow, col, row_of, chunks = index
    (tokens, inner), outer, (height, width) = x.shape, grad.shape[1], block
    out = x.new_empty(col.numel(), height, width)
    if out.numel() == 0 or tokens == 0:
        return out.zero_()
    config = config or grad_config(x, chunks.numel(), block, multiprocessors(x.device))
    split = config.split
    to = x.new_empty(split, *out.shape, dtype=torch.float32) if split > 1 else out
    row_parts = ceil_div(height, config.rows)
    sddmm_kernel[(chunks.numel(), split * row_parts, ceil_div(width, config.cols))](
        grad, x, crow, col, row_of, chunks, to, tokens, inner, outer, out.numel(),
        grad.stride(0), x.stride(0),
        **sddmm_constants(config, height, width, (outer, inner), x.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split > 1:
        reduce_parts(to, out, None, "none")
    return out


def sddmm_constants(config: GradConfig, height: int, width: int, shape, dtype) -> dict:
    """The constants of `sddmm_kernel` for blocks height x width of a weight of this shape."""
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "PADDED": power_of_two(width),
        "BLOCK_R": config.rows,
        "BLOCK_C": config.cols,
        "BLOCK_T": config.tokens,
        "SPLIT": config.split,
        "RAGGED_R": shape[0] % height != 0,
        "RAGGED_C": shape[1] % width != 0,
        "PRECISION": precision(dtype),
        "UPCAST": upcast(dtype),
    }
