"""2:4 weights in the order of the fragments of `mma.sp.m16n8k32`, for csrc/cuda/decode_nm.cu.

A unit is 32 rows x 128 columns in 4608 bytes: 512 of metadata and eight fragments of 512, each 16
rows x 32 columns, the upper rows first. Lane l = 4 g + t of a warp reads 16 bytes of each:

- of a fragment, four registers of two values: row g and row g + 8 at slots 2 t and 2 t + 1, then
  both at slots 8 + 2 t and 9 + 2 t;
- of the metadata, a word for each 32 columns, for the upper rows in lanes with t = 0, 1 and for the
  lower ones in t = 2, 3; of such a pair the first has columns 0 to 15, the second 16 to 31, row g
  in the low half and row g + 8 in the high one. Four columns are four bits, as in our index.

Source: PTX ISA, matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

UNIT_ROWS, UNIT_COLS, UNIT_BYTES = 32, 128, 4608
# Columns 0 and 1 of both groups of a byte: metadata have to rise, also those of padding.
RISING = 0x44


def nm_pack(values: Tensor, index: Tensor, cols: int) -> Tensor:
    """The packed form, uint8 `(strips * units * 4608,)`, without a wait.

    Args:
        values: `(out, slots)` of 16 bits, as in `nm_linear` with n, m = 2, 4.
        index: `(out, bytes)` uint8, checked before.
        cols: Columns of the weight.
    """
    rows, slots = values.shape
    strips, units = -(-rows // UNIT_ROWS), -(-cols // UNIT_COLS)
    more_rows = strips * UNIT_ROWS - rows
    whole = pad(values, (0, units * UNIT_COLS // 2 - slots, 0, more_rows)).view(torch.int32)
    # row = 16 tile + 8 high + group; pair of slots = 32 unit + 8 step + 4 half + thread
    fragments = whole.view(strips, 2, 2, 8, units, 4, 2, 4)
    strip, tile, high, group, unit, step, half, thread = range(8)
    fragments = fragments.permute(strip, unit, tile, step, group, thread, half, high)
    if -(-cols // 4) % 2:  # half a byte of the index that nothing stands in
        index = torch.cat([index[:, :-1], index[:, -1:] & 0x0F | RISING & 0xF0], 1)
    missing = units * UNIT_COLS // 8 - index.shape[1]
    metadata = pad(index, (0, missing, 0, more_rows), value=RISING).view(torch.int16)
    metadata = metadata.view(strips, 2, 2, 8, units, 4, 2)
    metadata = metadata.permute(strip, unit, group, tile, half, step, high).reshape(-1, 256)
    parts = [metadata.view(torch.int32), fragments.reshape(-1, 1024)]
    return torch.cat(parts, 1).view(torch.uint8).flatten()
