"""Weights as our CUDA kernels read them, taken apart again."""

import pytest
import torch
from samples import csr_of, random_nm, random_weight

from sparsekern.ops.csr_packed import csr_lists, slice_width, two_four_and_rest
from sparsekern.ops.nm import nm_to_dense
from sparsekern.ops.nm_packed import nm_pack


def coordinates(rows, cols, sparsity, dtype=torch.bfloat16):
    values, crow, col = csr_of(random_weight(rows, cols, sparsity).to(dtype))
    return values, torch.repeat_interleave(torch.arange(rows), crow.diff().long()), col.long()


def dense_of(values, row, col, rows, cols):
    return torch.zeros(rows, cols).index_put_((row, col), values.float())


@pytest.mark.parametrize("rows, cols", [(32, 128), (1, 4), (33, 130), (70, 300), (5, 7)])
def test_fragments_hold_the_weight(rows, cols):
    """Read register by register, as the PTX ISA says."""
    values, index = random_nm(rows, cols, 2, 4)
    values = values.bfloat16()
    strips, units = -(-rows // 32), -(-cols // 128)
    packed = nm_pack(values, index, cols)
    assert packed.numel() == strips * units * 4608
    words = packed.view(torch.int32).view(strips, units, 9, 32, 4)
    numbers = words.view(torch.bfloat16).view(strips, units, 9, 32, 8).float()
    have = torch.zeros(strips * 32, units * 128)
    for tile in (0, 1):
        for step in range(4):
            for lane in range(32):
                for i in range(8):
                    row = lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8)
                    first = lane % 4 * 4 + (0 if i < 4 else 16)
                    holder = lane // 4 * 4 + tile * 2 + first // 16
                    bits = words[:, :, 0, holder, step] >> (row // 8 * 16 + first % 16 + i % 2 * 2)
                    col = first + step * 32 + (bits & 3)
                    at = (torch.arange(strips) * 32 + tile * 16 + row)[:, None]
                    col = torch.arange(units) * 128 + col
                    have[at, col] += numbers[:, :, 1 + tile * 4 + step, lane, i]
    want = nm_to_dense("test", values, index, cols, 2, 4).float()
    assert torch.equal(have[:rows, :cols], want)
    assert not have[rows:].any() and not have[:, cols:].any()


@pytest.mark.parametrize("rows, cols, sparsity", [(40, 1300, 0.8), (3, 64, 0.2), (9, 5, 1.0)])
def test_lists_hold_the_weight(rows, cols, sparsity):
    values, row, col = coordinates(rows, cols, sparsity)
    words, starts = csr_lists(values, row, col, rows, cols)
    width = slice_width(cols)
    assert starts.numel() == -(-cols // width) * rows + 1 and starts[-1] * 4 == words.numel()
    which = torch.repeat_interleave(torch.arange(starts.numel() - 1), starts.diff().long() * 4)
    local = words & 0xFFFF
    filled = local < width
    assert torch.all(local <= width) and not (words[~filled] >> 16).any()
    assert (~filled).sum() <= 3 * (starts.numel() - 1)
    number = (words >> 16).to(torch.int16).view(torch.bfloat16)[filled]
    columns = which[filled] // rows * width + local[filled]
    have = dense_of(number, which[filled] % rows, columns, rows, cols)
    assert torch.equal(have, dense_of(values, row, col, rows, cols))


def test_lanes_meet_different_banks():
    """Eight lanes read words four apart at once: columns that differ in three bits, mostly."""
    values, row, col = coordinates(64, 1024, 0.8)
    words, starts = csr_lists(values, row, col, 64, 1024)
    deepest = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        for lap in range(begin, end - 7, 8):
            at_once = words[lap * 4 : lap * 4 + 32].view(8, 4) & 7
            deepest += [int(torch.bincount(step).max()) for step in at_once.t()]
    mean = sum(deepest) / len(deepest)
    assert mean < 1.7  # 2.6 in random order


@pytest.mark.parametrize("rows, cols, sparsity", [(16, 64, 0.5), (9, 30, 0.3), (4, 5, 0.0)])
def test_two_four_and_rest_are_the_weight(rows, cols, sparsity):
    values, row, col = coordinates(rows, cols, sparsity)
    slots, index, rest = two_four_and_rest(values, row, col, rows, cols)
    whole = -(-cols // 4) * 4
    kept = nm_to_dense("test", slots, index, whole, 2, 4)  # checks the index as well
    assert not kept[:, cols:].any()
    have = kept[:, :cols].float() + dense_of(values[rest], row[rest], col[rest], rows, cols)
    assert torch.equal(have, dense_of(values, row, col, rows, cols))
    per_group = dense_of(values, row, col, rows, whole).view(rows, -1, 4).ne(0).sum(2)
    assert rest.sum() == (per_group - 2).clamp(min=0).sum()


def test_slices_are_even_and_aligned():
    for cols in (1, 8, 1024, 1025, 4096, 11008, 14336):
        width = slice_width(cols)
        assert width % 8 == 0 and width <= 1024
        assert -(-cols // width) == -(-cols // 1024)
        assert -(-(cols + -cols % 8) // width) == -(-cols // width)
