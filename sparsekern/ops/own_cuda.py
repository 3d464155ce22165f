"""Our own CUDA kernels for few tokens (csrc/cuda/decode_*.cu): when they can run, and the calls.

They take weights of 16 bits and up to 64 tokens, packed once per weight (see cuda_packed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _load
from ._library import ACTIVATIONS  # by their number in csrc/cuda/decode.h
from .csr_packed import csr_lists, slice_width, two_four_and_rest
from .cuda_packed import Packed, keep_place, packed_weight
from .cuda_support import aligned, capturing, device_fault, half_fault, multiprocessors, refuse
from .nm_packed import UNIT_COLS, nm_pack

MAX_TOKENS = 64
GATHER_TOKENS = 16  # each eight tokens read the lists again
DTYPES = (torch.bfloat16, torch.float16)
# Densities between which a form can be shorter than the dense weight, with something to spare.
GATHER_DENSITY = (0.0, 0.5)
REST_DENSITY = (0.15, 0.7)
MAX_SIZE = 1 << 24
CLUSTERS = (9, 0)  # the first compute capability that has them
MAX_CLUSTER = 8  # blocks, on every device that has clusters
MAX_CHANGES = 16  # to sort the lists takes longer than some dense products
_OPS = torch.ops.sparsekern


def kernel_fault(device) -> str:
    """Say why our CUDA kernels cannot be used on a device; empty when they can."""
    return device_fault(device, (8, 0)) or build_fault()


def build_fault() -> str:
    """Say why kernels of ours are not built, on any device; empty when they are."""
    if half_fault():
        return half_fault()
    reason = _load.cuda_half()[0].build_info()["kernels"]
    return f"expected CUDA kernels compiled by nvcc, got none: {reason}" if reason else ""


def takes(x: Tensor, rows: int) -> bool:
    """Whether tokens and sizes are what the kernels are for; `x` is `(tokens, in)`."""
    fits = 0 < x.shape[0] <= MAX_TOKENS and max(rows, x.shape[1]) < MAX_SIZE
    return fits and x.dtype in DTYPES


def nm_split(tokens: int, rows: int, cols: int, processors: int) -> int:
    """Into how many parts to cut the sums so that blocks fill the device; see decode_nm.cu."""
    strips, slices = (1, 8) if tokens <= 8 else (2, 4) if tokens <= 16 else (4, 2)
    tiles = -(-rows // (32 * strips))
    chunks = -(-cols // (UNIT_COLS * slices))
    # A second kernel adds the parts up: not for the sake of the last few processors.
    wanted = 1 if tiles >= 0.8 * processors else -(-processors // tiles)
    share = -(-chunks // min(wanted, chunks, 16))
    return -(-chunks // share)


def nm_ways(x: Tensor, rows: int, capability: tuple[int, int]) -> dict[str, bool]:
    """Our ways to multiply a 2:4 weight, and whether the blocks of a cluster add up their parts.

    Only Hopper and later have clusters; elsewhere, and in the other way, a second kernel adds.
    """
    ways = {"mma.sp": False}
    split = nm_split(x.shape[0], rows, x.shape[1], multiprocessors(x.device))
    if capability >= CLUSTERS and 1 < split <= MAX_CLUSTER:
        ways["mma.sp cluster"] = True
    return ways


def nm_linear(
    x: Tensor, values, index, bias, activation: str, held: Packed, cluster: bool, split: int = 0
):
    """act(x W^T + b) for x `(tokens, in)` and a 2:4 weight; `(tokens, out)`.

    `split` is the number of parts of each sum; 0 for as many as fill the device.
    """
    cols = x.shape[1]

    def pack(old):
        return keep_place(old, (nm_pack(values, index, cols),))

    (packed,) = packed_weight(held, values, pack)
    rows = index.shape[0]
    split = split or nm_split(x.shape[0], rows, cols, multiprocessors(x.device))
    bias = aligned(bias) if bias is not None else None
    code = ACTIVATIONS.index(activation)
    return _OPS._own_nm_decode(_padded(x), packed, bias, rows, code, split, cluster)


def _padded(x: Tensor) -> Tensor:
    """With rows that begin at 16 bytes; no copy where they do."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x


def csr_ways(x: Tensor, rows: int, nnz: int) -> list[str]:
    """The ways of ours that can win for a weight of this density."""
    density, found = nnz / (rows * x.shape[1]), []
    if x.shape[0] <= GATHER_TOKENS and GATHER_DENSITY[0] < density <= GATHER_DENSITY[1]:
        found.append("gather")
    if REST_DENSITY[0] <= density <= REST_DENSITY[1]:
        found.append("2:4 + rest")
    return found


def csr_linear(way: str, x: Tensor, values, crow, col, bias, activation: str, held: Packed):
    """act(x W^T + b) for x `(tokens, in)` and a CSR weight, by one of the ways of `csr_ways`."""
    rows, cols = crow.numel() - 1, x.shape[1]

    def pack(old):
        if capturing(x):  # it reads a size back
            refuse("csr_linear", "one product before the capture", "a weight to be packed")
        if held.changes > MAX_CHANGES:
            held.release()
            refuse("csr_linear", "a weight that stays", f"one that changed {held.changes} times")
        return keep_place(old, _pack_csr(way, values, crow, col, cols))

    words, starts, *rest = packed_weight(held, values, pack)
    packed = rest[0] if rest else None
    split = nm_split(x.shape[0], rows, cols, multiprocessors(x.device)) if rest else 1
    bias = aligned(bias) if bias is not None else None
    code = ACTIVATIONS.index(activation)
    return _OPS._own_csr_decode(
        _padded(x), words, starts, packed, bias, rows, slice_width(cols), code, split
    )


def _pack_csr(way: str, values: Tensor, crow: Tensor, col: Tensor, cols: int) -> tuple:
    rows = crow.numel() - 1
    row = torch.repeat_interleave(
        torch.arange(rows, device=crow.device), crow.diff().long(), output_size=col.numel()
    )
    col = col.long()
    if way == "gather":
        return csr_lists(values, row, col, rows, cols)
    slot_values, index, rest = two_four_and_rest(values, row, col, rows, cols)
    lists = csr_lists(values[rest], row[rest], col[rest], rows, cols)
    return (*lists, nm_pack(slot_values, index, cols))
