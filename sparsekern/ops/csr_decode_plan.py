"""The index forms that the few-token GPU kernels read instead of int32 columns.

A decode step reads every stored weight once, so bytes bound it. At density d, for two-byte values,
a dense weight costs 2 bytes, and

- `chunks` 3.25 d bytes: values in runs of eight, counted from the first value of the matrix, so
  that a run is one aligned 16-byte load. A run has a 16-bit start, the column of its first value,
  and eight one-byte distances from it. Values of a row that begins inside of the run count from
  column 0 instead.
- `columns` 4 d bytes: 16-bit columns; where some distance does not fit in a byte.
- `bitmap` 2 d + 3 / 16 bytes: a word for 32 columns, and how many values of the row precede it.

A plan holds `chunks` or `columns`, and `bitmap` too unless the weight is very sparse. It depends on
the pattern alone: values stay in CSR order, so training never repacks them. Which forms a plan
holds can be told from its size, so nothing has to be read back from the device.
"""

from typing import NamedTuple

import torch

CHUNK = 8
MAX_COLUMNS = 1 << 16
# Below this density few values share a word; the bitmap would be most of the bytes.
BITMAP_DENSITY = 1 / 16


class DecodeLayout(NamedTuple):
    """Where the parts of a plan start, in int32 words; every part is aligned to 16 bytes.

    Attributes:
        columns: Start of the distances (uint8) or, if not `bytes`, of the columns (uint16); the
            starts of the runs (uint16) are at 0.
        words: Start of the bitmap, `(rows, ceil(cols / 32))`.
        prefix: Start of the counts (uint16), shaped as the bitmap.
        size: Words of all parts.
        bytes: The plan holds `chunks`.
        bitmap: The plan holds `bitmap`.
    """

    columns: int
    words: int
    prefix: int
    size: int
    bytes: bool
    bitmap: bool


def decode_layout(rows: int, cols: int, nnz: int, bytes: bool, bitmap: bool) -> DecodeLayout:
    """The layout of a plan with these forms."""
    chunks = -(-nnz // CHUNK)
    columns = _aligned(-(-chunks // 2)) if bytes else 0
    words = columns + _aligned(chunks * (2 if bytes else 4))
    count = rows * -(-cols // 32) if bitmap else 0
    prefix = words + _aligned(count)
    return DecodeLayout(columns, words, prefix, prefix + _aligned(-(-count // 2)), bytes, bitmap)


def layout_of(plan: torch.Tensor, rows: int, cols: int, nnz: int) -> DecodeLayout:
    """The layout of a plan that `csr_decode_pack` made for a pattern of these sizes.

    Raises:
        RuntimeError: The plan belongs to another pattern.
    """
    forms = plan.numel() % 4
    layout = decode_layout(rows, cols, nnz, bool(forms & 1), bool(forms & 2))
    if plan.numel() != layout.size + forms:
        raise RuntimeError(
            f"csr_decode: expected plan of {layout.size + forms} words for {rows} x {cols} with "
            f"{nnz} values, got {plan.numel()}"
        )
    return layout


def csr_decode_pack(crow: torch.Tensor, col: torch.Tensor, cols: int) -> torch.Tensor:
    """The plan of a pattern: int32, on its device. Waits for the device once.

    Args:
        crow: `(rows + 1,)` int32, checked before.
        col: `(nnz,)` int32, rising inside each row, checked before.
        cols: Columns of the weight.

    Returns:
        The plan; empty if there are more than 65536 columns (`csr_spmm` serves those).
    """
    rows, nnz = crow.numel() - 1, col.numel()
    if cols > MAX_COLUMNS:
        return crow.new_empty((0,))
    row = torch.repeat_interleave(
        torch.arange(rows, device=crow.device), crow.diff().long(), output_size=nnz
    )
    starts, distances = _chunks(crow, col, row)
    bytes = bool(((distances >= 0) & (distances < 256)).all())
    bitmap = nnz >= BITMAP_DENSITY * rows * cols
    layout = decode_layout(rows, cols, nnz, bytes, bitmap)
    plan = crow.new_zeros(layout.size + bytes + 2 * bitmap)
    if bytes:
        _put(plan, 0, _uint16(starts))
        _put(plan, layout.columns, distances.to(torch.uint8))
    else:
        _put(plan, 0, _uint16(col))
    if bitmap:
        words, prefix = _bitmap(crow, col, row, cols)
        _put(plan, layout.words, words)
        _put(plan, layout.prefix, _uint16(prefix))
    return plan


def _aligned(words: int) -> int:
    return -(-words // 4) * 4


def _chunks(crow, col, row):
    """Start of each run of eight values, and the distance of each value; int32."""
    starts = col[::CHUNK]
    run = torch.arange(col.numel(), device=col.device) // CHUNK
    open_before = crow[row] <= run * CHUNK  # the row that the start of the run belongs to
    return starts, col - torch.where(open_before, starts[run], 0)


def _bitmap(crow, col, row, cols: int):
    """The words, and how many values of their row precede each; flat int32."""
    rows, width = crow.numel() - 1, -(-cols // 32)
    word = row * width + col // 32
    bit = torch.ones_like(col) << col % 32
    words = crow.new_zeros(rows * width).index_add_(0, word, bit)
    counts = crow.new_zeros(rows * width).index_add_(0, word, torch.ones_like(col))
    before = counts.view(rows, width).cumsum(1, dtype=torch.int32) - counts.view(rows, width)
    return words, before.flatten()


def _uint16(x: torch.Tensor) -> torch.Tensor:
    """The low 16 bits, as int16."""
    return torch.where(x > 32767, x - 65536, x).to(torch.int16)


def _put(plan, start: int, part) -> None:
    """Copy the bytes of a part into the plan from a word on."""
    plan[start:].view(part.dtype)[: part.numel()].copy_(part)
