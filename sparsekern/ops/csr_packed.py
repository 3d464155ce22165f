"""Forms of an unstructured weight of 16 bits for csrc/cuda/decode_csr.cu and decode_nm.cu.

`csr_lists`: every weight is a word of 4 bytes, its value above its column. The columns are cut into
slices; each slice and row has a list, which begins at 16 bytes. Eight lanes read a list, 16 bytes
each at a time, and gather x at 16 bytes a column, so columns that differ in their last three bits
lie in different banks: the order in a list gives the lanes such columns, as long as there are any.

`two_four_and_rest`: of each four columns of a row, the first two weights go into a 2:4 weight and
are multiplied by the tensor cores, the third and fourth into lists. At 50 % zeros a fifth of the
weights are left over, at 70 % a thirteenth: 1.5 and 1.2 bytes a weight instead of 2, with nothing
to spread.
"""

import torch
from torch import Tensor

MAX_WIDTH = 1024  # columns of a slice; eight tokens of it take 16 KiB of shared memory
LANES = 8  # that read a list, four words each at a time
WORDS = 4


def slice_width(cols: int) -> int:
    """Columns of a slice: as even as can be, a multiple of eight."""
    slices = -(-cols // MAX_WIDTH)
    return -(-cols // (slices * 8)) * 8


def csr_lists(values: Tensor, row: Tensor, col: Tensor, rows: int, cols: int):
    """Words int32 and starts int32 `(slices * rows + 1,)`, in steps of 16 bytes; waits once.

    Args:
        values: `(nnz,)` of 16 bits.
        row: `(nnz,)` int64, rising.
        col: `(nnz,)` int64, rising inside each row.
        rows: Rows of the weight.
        cols: Columns of the weight.
    """
    width = slice_width(cols)
    lists = -(-cols // width) * rows
    which, local = col // width * rows + row, col % width
    order = _spread_banks(which, local, width)
    which, local = which[order], local[order]
    length = torch.bincount(which, minlength=lists)
    starts = _before((length + WORDS - 1) // WORDS)
    place = torch.arange(col.numel(), device=col.device) - _before(length)[which]
    # Of 32 words, the lanes take eight at once; the four that a lane takes lie together.
    lap = place // (LANES * WORDS) * (LANES * WORDS)
    lanes = ((length[which] - lap + WORDS - 1) // WORDS).clamp(max=LANES)
    at = starts[which] * WORDS + lap + (place - lap) % lanes * WORDS + (place - lap) // lanes
    # Words that fill up name the column behind the slice, which is 0.
    words = torch.full((int(starts[-1]) * WORDS,), width, dtype=torch.int32, device=col.device)
    words[at] = values.view(torch.int16)[order].to(torch.int32) << 16 | local.to(torch.int32)
    return words, starts.to(torch.int32)


def _spread_banks(which: Tensor, local: Tensor, width: int) -> Tensor:
    """An order that goes round the columns by their last three bits, inside each list."""
    bank = local % LANES
    key, order = torch.sort(which * LANES + bank, stable=True)
    round_of = torch.arange(key.numel(), device=key.device) - _before(torch.bincount(key))[key]
    key = (key // LANES * width + round_of) * LANES + key % LANES
    return order[torch.sort(key).indices]


def _before(counts: Tensor) -> Tensor:
    """What is before each, and all at the end."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def two_four_and_rest(values: Tensor, row: Tensor, col: Tensor, rows: int, cols: int):
    """A 2:4 weight, and which weights it does not hold.

    Returns:
        Its values `(rows, slots)`, its index `(rows, bytes)` uint8, and a mask `(nnz,)`, true for
        the third and fourth weight of four columns.
    """
    groups = -(-cols // 4)
    group, position = row * groups + col // 4, col % 4
    before = _before(torch.bincount(group, minlength=rows * groups))
    rank = torch.arange(col.numel(), device=col.device) - before[group]
    kept = rank < 2
    # Slots without a weight are 0 at columns 0 and 3. A single weight at column 3 takes the second.
    slot = group * 2 + ((rank == 1) | (position == 3)).long()
    slot_values = values.new_zeros(rows * groups * 2)
    slot_values[slot[kept]] = values[kept]
    positions = torch.tensor([0, 3], device=col.device).repeat(rows * groups)
    positions[slot[kept]] = position[kept]
    codes = positions.view(rows, groups, 2)
    codes = codes[..., 0] | codes[..., 1] << 2
    codes = torch.nn.functional.pad(codes, (0, groups % 2)).view(rows, -1, 2)
    index = (codes[..., 0] | codes[..., 1] << 4).to(torch.uint8)
    return slot_values.view(rows, -1), index, ~kept
