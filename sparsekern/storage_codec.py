"""How a sparse weight lies in a file: `values`, plus its positions.

A CSR weight takes the smaller of two codes:
`csr`: `crow` (int32) and `col`, in the narrowest unsigned type that holds every column.
`mask`: `mask`, one bit per weight of the dense shape, row-major, lowest bit first.
With int8 values they are named `csr_int8` and `mask_int8` and have `scales`, a float32 per row.
The other formats are stored as they are, with the parts of their weights: `block`, `block_int8`,
`nm`, `nm_int8`, `nm_float8`, and those of 8 bits but csr with `_dynamic` behind them.
"""

import numpy as np
import torch
from torch import Tensor

from .patterns import NM, parse
from .weight_base import INT32_MAX, SparseWeight
from .weights import FORMATS, BlockWeight, CSRWeight, NMWeight
from .weights_int8 import (
    DynamicFloat8NMWeight,
    DynamicInt8BlockWeight,
    DynamicInt8NMWeight,
    Float8NMWeight,
    Int8BlockWeight,
    Int8CSRWeight,
    Int8NMWeight,
)

AS_THEY_ARE = {
    weight.format: weight
    for weight in (
        BlockWeight, Int8BlockWeight, DynamicInt8BlockWeight, NMWeight, Int8NMWeight,
        DynamicInt8NMWeight, Float8NMWeight, DynamicFloat8NMWeight,
    )
}  # fmt: skip
PARTS = {
    **{name: weight.parts for name, weight in FORMATS.items()},
    "mask": ("values", "mask"),
    "csr_int8": Int8CSRWeight.parts,
    "mask_int8": ("values", "scales", "mask"),
    **{name: weight.parts for name, weight in AS_THEY_ARE.items()},
}


def column_dtype(cols: int) -> torch.dtype:
    """The narrowest dtype for column indices in [0, cols): uint8, uint16 or int32."""
    if cols <= 2**8:
        return torch.uint8
    return torch.uint16 if cols <= 2**16 else torch.int32


def encode(weight: SparseWeight) -> tuple[dict, dict[str, Tensor]]:
    """Describe a weight for the header, and give its tensors by part name, on the CPU.

    Returns:
        `{"shape", "pattern", "encoding"}` with plain values, and the parts that `PARTS` lists for
        the encoding; contiguous, in the dtype of the values for `values`.
    """
    values = weight.values.detach().cpu().contiguous()
    if isinstance(weight, CSRWeight):
        encoding, parts = _encode_csr(weight)
    else:
        encoding = weight.format
        parts = {name: getattr(weight, name).cpu().contiguous() for name in weight.parts[1:]}
    if isinstance(weight, Int8CSRWeight):
        encoding += "_int8"
        parts["scales"] = weight.scales.cpu().contiguous()
    header = {"shape": list(weight.shape), "pattern": weight.pattern, "encoding": encoding}
    return header, {"values": values, **parts}


def _encode_csr(weight: CSRWeight) -> tuple[str, dict[str, Tensor]]:
    crow, col = weight.crow.cpu(), weight.col.cpu()
    rows, cols = weight.shape[0], weight.shape[1:].numel()
    narrow = column_dtype(cols)
    csr_bytes = 4 * crow.numel() + narrow.itemsize * col.numel()
    if csr_bytes < -(-rows * cols // 8):
        return "csr", {"crow": crow.contiguous(), "col": col.to(narrow)}
    bits = np.packbits(weight.mask().cpu().view(-1).numpy(), bitorder="little")
    return "mask", {"mask": torch.from_numpy(bits)}


def check_header(header) -> None:
    """Raise ValueError unless `header` is what `encode` writes: shape, pattern, encoding."""
    if not isinstance(header, dict) or set(header) != {"shape", "pattern", "encoding"}:
        raise ValueError(f"expected a description with shape, pattern, encoding, got {header!r}")
    shape, encoding = header["shape"], header["encoding"]
    sizes_ok = isinstance(shape, list) and all(type(n) is int and 0 <= n for n in shape)
    if not sizes_ok or len(shape) not in (2, 4):
        raise ValueError(f"expected a shape of 2 or 4 sizes, got {shape!r}")
    if torch.Size(shape[1:]).numel() > INT32_MAX:
        raise ValueError(f"expected sizes below 2^31, got {shape!r}")
    if not isinstance(encoding, str) or encoding not in PARTS:
        raise ValueError(f"expected encoding one of {', '.join(PARTS)}, got {encoding!r}")
    if not isinstance(header["pattern"], str):
        raise ValueError(f"expected the pattern as a string, got {header['pattern']!r}")
    pattern = parse(header["pattern"])
    if encoding.startswith("nm") and not isinstance(pattern, NM):
        got = repr(header["pattern"])
        raise ValueError(f"expected an N:M pattern with encoding {encoding}, got {got}")


def decode(header: dict, parts: dict[str, Tensor]) -> SparseWeight:
    """Give the weight, every index checked, without schedules; groups are those of the target.

    Args:
        header: As `check_header` accepts it.
        parts: The tensors `PARTS` lists for its encoding.

    Raises:
        ValueError: A part has the wrong dtype or size, or an index is out of place.
    """
    values, shape, encoding = parts["values"], header["shape"], header["encoding"]
    if encoding in AS_THEY_ARE:
        ordered = (parts[name] for name in PARTS[encoding])
        return AS_THEY_ARE[encoding](*ordered, shape, header["pattern"], plans=False)
    if "mask" in parts:
        crow, col = _from_mask(parts["mask"], shape)
    else:
        crow, col = parts["crow"], parts["col"]
        wanted = column_dtype(torch.Size(shape[1:]).numel())
        if col.dtype != wanted:
            raise ValueError(f"expected col of dtype {wanted}, got {col.dtype}")
        col = col.to(torch.int32)
    if "scales" in parts:
        index = (parts["scales"], crow, col)
        return Int8CSRWeight(values, *index, shape, header["pattern"], plans=False)
    return CSRWeight(values, crow, col, shape, header["pattern"], plans=False)


def _from_mask(mask: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    rows, total = shape[0], torch.Size(shape).numel()
    wanted = -(-total // 8)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (wanted,):
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(f"expected mask ({wanted},) of torch.uint8, got {got}")
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    if bits[total:].any():
        raise ValueError("expected the padding bits of mask to be 0, got 1")
    kept = torch.from_numpy(bits[:total].astype(bool)).view(rows, torch.Size(shape[1:]).numel())
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = kept.sum(1).cumsum(0)
    return crow, kept.nonzero()[:, 1].to(torch.int32)
