"""Triton kernels that prune to 2:4 by magnitude, one pass over memory.

`prune_rows` keeps two of every four weights along the inputs, `prune_tiles` two of every four along
inputs and outputs: of the 90 masks of a 4 x 4 tile the one with the largest sum (Hubara et al.
2021, arXiv:2102.08124, section 4), sums in float32. Of equal ones the first, as in
`sparsekern.patterns`. The result may be written transposed.

This module imports Triton; nothing but a call with CUDA tensors imports this module.
"""

import torch
import triton
import triton.language as tl

from .cuda_support import ceil_div
from .decode_triton import on_device

GROUPS = 256  # groups of four, or tiles, of a program
# The pairs of four columns, (0,1) (0,2) (0,3) (1,2) (1,3) (2,3), as bits of a hexadecimal digit
# each, lowest first. Pair 5 - i holds the columns that pair i does not.
PAIRS = tl.constexpr(0xCA6953)


@triton.jit
def prune_rows_kernel(weight, out, groups, GROUPS: tl.constexpr):
    """GROUPS groups of four neighbours."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    member = tl.arange(0, 4)
    at = group[:, None] * 4 + member[None, :]
    inside = (group < groups)[:, None]
    value = tl.load(weight + at, mask=inside, other=0)
    size = tl.abs(value.to(tl.float32))
    ahead = size[:, None, :] > size[:, :, None]
    tied = (size[:, None, :] == size[:, :, None]) & (member[None, None, :] < member[None, :, None])
    rank = tl.sum((ahead | tied).to(tl.int32), 2)
    kept = tl.where(rank < 2, value.to(tl.float32), 0.0) + 0.0  # -0.0 becomes 0.0
    tl.store(out + at, kept.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row(weight, inside):
    """The four weights of each tile in one row, their sizes, and the sums of all pairs of them."""
    w0, w1 = tl.load(weight, mask=inside, other=0), tl.load(weight + 1, mask=inside, other=0)
    w2, w3 = tl.load(weight + 2, mask=inside, other=0), tl.load(weight + 3, mask=inside, other=0)
    w0, w1, w2, w3 = w0.to(tl.float32), w1.to(tl.float32), w2.to(tl.float32), w3.to(tl.float32)
    a, b, c, d = tl.abs(w0), tl.abs(w1), tl.abs(w2), tl.abs(w3)
    return (w0, w1, w2, w3), (a + b, a + c, a + d, b + c, b + d, c + d)


@triton.jit
def _larger(best, code, total, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, S: tl.constexpr):
    """The larger of two sums, and which pairs of columns the four rows have in it."""
    better = total > best
    return tl.where(better, total, best), tl.where(better, P + 8 * Q + 64 * R + 512 * S, code)


@triton.jit
def _store_row(out, row, code, inside, by_col, R: tl.constexpr):
    pair = (code >> (3 * R)) & 7
    bits = (PAIRS >> (4 * pair)) & 15
    for c in tl.static_range(4):
        kept = tl.where((bits >> c) & 1 == 1, row[c], 0.0) + 0.0  # -0.0 becomes 0.0
        tl.store(out + c * by_col, kept.to(out.dtype.element_ty), mask=inside)


@triton.jit
def prune_tiles_kernel(weight, out, tiles, cols, by_row, by_col, TILES: tl.constexpr):
    """TILES tiles of four rows and four columns; out[r, c] is at r * by_row + c * by_col."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = tile < tiles
    top, left = (tile // (cols // 4)).to(tl.int64) * 4, (tile % (cols // 4)) * 4
    start = weight + top * cols + left
    r0, p0 = _row(start, inside)
    r1, p1 = _row(start + cols, inside)
    r2, p2 = _row(start + 2 * cols, inside)
    r3, p3 = _row(start + 3 * cols, inside)
    best = tl.full((TILES,), -1.0, tl.float32)
    code = tl.zeros((TILES,), tl.int32)
    # Two columns that rows 0 and 1 share are full; rows 2 and 3 fill the others.
    for i in tl.static_range(6):
        for j in tl.static_range(6):
            half = p0[i] + p1[j]
            if i + j == 5:  # every column has one: rows 2 and 3 complete each other as well
                for k in tl.static_range(6):
                    best, code = _larger(best, code, half + (p2[k] + p3[5 - k]), i, j, k, 5 - k)
            elif i > j:
                total = half + (p2[5 - i] + p3[5 - j])
                best, code = _larger(best, code, total, i, j, 5 - i, 5 - j)
                total = half + (p2[5 - j] + p3[5 - i])
                best, code = _larger(best, code, total, i, j, 5 - j, 5 - i)
            else:
                total = half + (p2[5 - j] + p3[5 - i])
                best, code = _larger(best, code, total, i, j, 5 - j, 5 - i)
                if i != j:
                    total = half + (p2[5 - i] + p3[5 - j])
                    best, code = _larger(best, code, total, i, j, 5 - i, 5 - j)
    to = out + top * by_row + left.to(tl.int64) * by_col
    _store_row(to, r0, code, inside, by_col, 0)
    _store_row(to + by_row, r1, code, inside, by_col, 1)
    _store_row(to + 2 * by_row, r2, code, inside, by_col, 2)
    _store_row(to + 3 * by_row, r3, code, inside, by_col, 3)


def prune_rows(weight: torch.Tensor) -> torch.Tensor:
    """A weight `(out, in)`, contiguous, with two of every four inputs kept; +0 elsewhere."""
    out, groups = torch.empty_like(weight), weight.numel() // 4
    if groups:
        with on_device(weight):
            prune_rows_kernel[(ceil_div(groups, GROUPS),)](weight, out, groups, GROUPS=GROUPS)
    return out


def prune_tiles(weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """A weight `(out, in)`, contiguous, with two of every four inputs and outputs kept.

    Returns `(out, in)`, or `(in, out)` where it is to be transposed; +0 where dropped.
    """
    rows, cols = weight.shape
    out = weight.new_empty((cols, rows) if transposed else (rows, cols))
    steps = (1, rows) if transposed else (cols, 1)
    tiles = weight.numel() // 16
    if tiles:
        with on_device(weight):
            prune_tiles_kernel[(ceil_div(tiles, GROUPS),)](
                weight, out, tiles, cols, *steps, TILES=GROUPS
            )
    return out
