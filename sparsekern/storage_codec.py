"""How a sparse weight lies in a file: `values`, plus its positions.

A CSR weight takes the smaller of two codes:
`csr`: `crow` (int32) and `col`, in the narrowest unsigned type that holds every column.
`mask`: `mask`, one bit per weight of the dense shape, row-major, lowest bit first.
With int8 values they are named `csr_int8` and `mask_int8` and have `scales`, a float32 per row.
The other formats are stored as they are, with the parts of their weights: `block`, `block_int8`,
`nm`, `nm_int8`, `nm_float8`, and those of 8 bits but csr with `_dynamic` behind them.
A dense tensor with many zeros takes `csr` or `mask`, too. Where some of its zeros are negative, as
`weight * mask` leaves them, the code is `csr_signs` or `mask_signs` and has `signs`: one bit per
weight as in `mask`, set for negative zeros.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ops._library import row_of_each
from .patterns import NM, Block, Vector, parse
from .weight_base import INT32_MAX, SparseWeight
from .weight_checks import check_csr
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
    "csr_signs": ("values", "crow", "col", "signs"),
    "mask_signs": ("values", "mask", "signs"),
}
PACKED = ("csr", "mask", "csr_signs", "mask_signs")  # the encodings of a dense tensor
ENCODINGS = tuple(name for name in PARTS if not name.endswith("_signs"))  # of a sparse weight
WORTH_PACKING = 0.9  # of the dense size; a tensor that is hardly smaller stays readable for others
DESCRIPTION_BYTES = 400  # of a packed tensor in the headers of a file, about
MASK_PIECE = 1 << 17  # bytes
# Integers that hold the bits of a floating point value of so many bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        rows, cols = weight.shape[0], weight.shape[1:].numel()
        crow, col = weight.crow.cpu(), weight.col.cpu()
        if _csr_is_smaller(rows, cols, col.numel()):
            encoding = "csr"
            parts = {"crow": crow.contiguous(), "col": col.to(column_dtype(cols))}
        else:
            encoding, parts = "mask", {"mask": _mask_bits(weight.mask().cpu())}
    else:
        encoding = weight.format
        parts = {name: getattr(weight, name).cpu().contiguous() for name in weight.parts[1:]}
    if isinstance(weight, Int8CSRWeight):
        encoding += "_int8"
        parts["scales"] = weight.scales.cpu().contiguous()
    header = {"shape": list(weight.shape), "pattern": weight.pattern, "encoding": encoding}
    return header, {"values": values, **parts}


def _position_bytes(rows: int, cols: int, nnz: int) -> tuple[int, int]:
    """What the codes `csr` and `mask` take beside the values."""
    return 4 * (rows + 1) + column_dtype(cols).itemsize * nnz, -(-rows * cols // 8)


def _csr_is_smaller(rows: int, cols: int, nnz: int) -> bool:
    csr, mask = _position_bytes(rows, cols, nnz)
    return csr < mask


def _mask_bits(kept: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(kept.reshape(-1).numpy(), bitorder="little"))


def pack_dense(tensor: Tensor) -> tuple[dict, dict[str, Tensor]] | None:
    """As `encode` for a dense tensor on the CPU; None where its zeros do not make it smaller.

    Args:
        tensor: Floating point, of two dimensions or more; contiguous.
    """
    fits = tensor.is_floating_point() and tensor.dim() >= 2 and 0 < tensor.numel() <= INT32_MAX
    if not fits or tensor.itemsize not in _BITS:
        return None
    rows, cols = tensor.shape[0], tensor[0].numel()
    bits = tensor.reshape(rows, cols).view(_BITS[tensor.itemsize])
    negative_zero = bits == torch.iinfo(bits.dtype).min  # the sign and nothing else
    kept = (bits != 0) & ~negative_zero
    nnz, signed = int(kept.count_nonzero()), bool(negative_zero.any())
    size = min(_position_bytes(rows, cols, nnz)) + nnz * tensor.itemsize + DESCRIPTION_BYTES
    if size + signed * (rows * cols // 8) > WORTH_PACKING * tensor.nbytes:
        return None
    parts = {"values": bits[kept].view(tensor.dtype)}
    encoding = "csr" if _csr_is_smaller(rows, cols, nnz) else "mask"
    if encoding == "csr":
        row, col = kept.nonzero(as_tuple=True)
        crow = torch.zeros(rows + 1, dtype=torch.int32)
        crow[1:] = torch.bincount(row, minlength=rows).cumsum(0)
        parts |= {"crow": crow, "col": col.to(column_dtype(cols))}
    else:
        parts["mask"] = _mask_bits(kept)
    if signed:
        encoding, parts["signs"] = f"{encoding}_signs", _mask_bits(negative_zero)
    return {"shape": list(tensor.shape), "encoding": encoding}, parts


@dataclass(frozen=True)
class Packed:
    """A dense tensor as `pack_dense` gives it, checked.

    Attributes:
        values, crow, col: Its nonzeros as CSR of the tensor as a matrix of `shape[0]` rows.
        negative: Where its negative zeros are, packed bits, or None.
        shape: Of the tensor.
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    negative: Tensor | None
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.values.dtype

    def to_dense(self) -> Tensor:
        """The tensor, bit for bit."""
        rows, cols = self.shape[0], self.shape[1:].numel()
        bits = torch.zeros(rows, cols, dtype=_BITS[self.values.itemsize])
        signs = () if self.negative is None else _set_bits(self.negative, "signs", rows * cols)
        for at in signs:
            bits.view(-1)[torch.from_numpy(at)] = torch.iinfo(bits.dtype).min
        bits[row_of_each(self.crow), self.col.long()] = self.values.view(bits.dtype)
        return bits.view(self.dtype).view(self.shape)


def unpack(header: dict, parts: dict[str, Tensor]) -> Packed:
    """The tensor that `pack_dense` took, without dense memory yet.

    Raises:
        ValueError: As `decode`.
    """
    values, shape = parts["values"], torch.Size(header["shape"])
    rows, cols = shape[0], shape[1:].numel()
    crow, col = _positions(parts, [rows, cols])
    check_csr(values, crow, col, (rows, cols))
    signs = parts.get("signs")
    if signs is not None:
        _check_bits(signs, "signs", rows * cols)
    return Packed(values, crow, col, signs, shape)


def check_header(header) -> None:
    """Raise ValueError unless `header` is what `encode` writes: shape, pattern, encoding."""
    _check_description(header, ("shape", "pattern", "encoding"), ENCODINGS)
    shape, encoding = header["shape"], header["encoding"]
    if len(shape) not in (2, 4):
        raise ValueError(f"expected a shape of 2 or 4 sizes, got {shortened(shape)}")
    if not isinstance(header["pattern"], str):
        raise ValueError(f"expected the pattern as a string, got {shortened(header['pattern'])}")
    pattern = parse(header["pattern"])
    if encoding.startswith("nm") and not isinstance(pattern, NM):
        got = repr(header["pattern"])
        raise ValueError(f"expected an N:M pattern with encoding {encoding}, got {got}")


def check_packed(header) -> None:
    """Raise ValueError unless `header` is what `pack_dense` writes: shape, encoding."""
    _check_description(header, ("shape", "encoding"), PACKED)
    if len(header["shape"]) < 2:
        raise ValueError(f"expected a shape of 2 sizes or more, got {header['shape']!r}")


def _check_description(header, names: tuple[str, ...], encodings) -> None:
    if not isinstance(header, dict) or set(header) != set(names):
        wanted = ", ".join(names)
        raise ValueError(f"expected a description with {wanted}, got {shortened(header)}")
    shape, encoding = header["shape"], header["encoding"]
    sizes_ok = isinstance(shape, list) and all(type(n) is int and 0 <= n for n in shape)
    if not sizes_ok or len(shape) > 16:
        raise ValueError(f"expected a shape of 2 or 4 sizes, got {shortened(shape)}")
    if max(math.prod(shape[:1]), math.prod(shape[1:])) > INT32_MAX:
        raise ValueError(f"expected sizes below 2^31, got {shortened(shape)}")
    if not isinstance(encoding, str) or encoding not in encodings:
        got = shortened(encoding)
        raise ValueError(f"expected encoding one of {', '.join(encodings)}, got {got}")


def shortened(value) -> str:
    """What came, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
        weight = AS_THEY_ARE[encoding](*ordered, shape, header["pattern"], plans=False)
        _check_block_pattern(weight)
        return weight
    crow, col = _positions(parts, shape)
    if "scales" in parts:
        index = (parts["scales"], crow, col)
        return Int8CSRWeight(values, *index, shape, header["pattern"], plans=False)
    return CSRWeight(values, crow, col, shape, header["pattern"], plans=False)


def _check_block_pattern(weight: SparseWeight) -> None:
    if not isinstance(weight, BlockWeight):
        return
    pattern, block = parse(weight.pattern), tuple(weight.values.shape[1:])
    tile = pattern.tile(weight.shape)[:2] if isinstance(pattern, Block | Vector) else None
    if tile != block:
        raise ValueError(f"expected blocks of pattern {pattern}, got {block[0]} x {block[1]}")


def _positions(parts: dict[str, Tensor], shape: list[int]) -> tuple[Tensor, Tensor]:
    """`crow` and `col`, int32, from the code `csr` or `mask`."""
    if "mask" in parts:
        return _from_mask(parts["mask"], shape, parts["values"].numel())
    wanted = column_dtype(torch.Size(shape[1:]).numel())
    if parts["col"].dtype != wanted:
        raise ValueError(f"expected col of dtype {wanted}, got {parts['col'].dtype}")
    return parts["crow"], parts["col"].to(torch.int32)


def _from_mask(mask: Tensor, shape: list[int], nnz: int) -> tuple[Tensor, Tensor]:
    """Read a mask in no more memory than its bits and `nnz` columns."""
    rows, total = shape[0], torch.Size(shape).numel()
    cols = max(1, torch.Size(shape[1:]).numel())
    if nnz > total:
        raise ValueError(f"expected at most {total} values, got {nnz}")
    col, counts, filled = np.empty(nnz, np.int32), np.zeros(rows, np.int64), 0
    for at in _set_bits(mask, "mask", total):
        if filled + len(at) > nnz:
            raise ValueError(f"expected {nnz} bits of mask to be 1, like values, got more")
        col[filled : filled + len(at)] = at % cols
        np.add.at(counts, at // cols, 1)
        filled += len(at)
    if filled != nnz:
        raise ValueError(f"expected {nnz} bits of mask to be 1, like values, got {filled}")
    crow = torch.zeros(rows + 1, dtype=torch.int32)
    crow[1:] = torch.from_numpy(counts.cumsum())
    return crow, torch.from_numpy(col)


def _set_bits(packed: Tensor, name: str, total: int) -> Iterator[np.ndarray]:
    """Where `total` packed bits are 1, int64, rising, a piece at a time."""
    _check_bits(packed, name, total)
    for start in range(0, packed.numel(), MASK_PIECE):
        piece = np.unpackbits(packed[start : start + MASK_PIECE].numpy(), bitorder="little")
        yield np.flatnonzero(piece) + 8 * start


def _check_bits(packed: Tensor, name: str, total: int) -> None:
    wanted = -(-total // 8)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (wanted,):
        got = f"{packed.dtype} of shape {tuple(packed.shape)}"
        raise ValueError(f"expected {name} ({wanted},) of torch.uint8, got {got}")
    if total % 8 and int(packed[-1]) >> total % 8:
        raise ValueError(f"expected the padding bits of {name} to be 0, got 1")
