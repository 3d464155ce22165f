"""What the parts of a sparse weight must be, and which patterns a format can store.

Everything from outside (files, state_dicts, callers) passes here before any kernel sees it.
"""

from functools import partial

import torch
from torch import Tensor

from .ops.block import block_grid
from .ops.nm import index_fault, slot_bits, slot_count
from .patterns import NM, Block, Vector
from .weight_base import INT32_MAX


def check(condition, wanted: str, got, op: str) -> None:
    """Raise `op: expected <wanted>, got <got>` unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: expected {wanted}, got {got}")


def _checker(op: str):
    return partial(check, op=op)


def check_csr(values: Tensor, crow: Tensor, col: Tensor, shape) -> None:
    """Raise ValueError unless the parts are a canonical CSR of a weight of `shape`.

    Args:
        values: `(nnz,)`, floating point.
        crow: `(rows + 1,)`, int32, from 0 to nnz, never falling; rows = shape[0].
        col: `(nnz,)`, int32, strictly rising inside each row, in [0, product of shape[1:]).
        shape: Shape of the dense weight, two or four dimensions.
    """
    check = _checker("CSRWeight")
    check(len(shape) in (2, 4), "a shape of 2 or 4 dimensions", tuple(shape))
    rows, cols = shape[0], torch.Size(shape[1:]).numel()
    check(max(rows, cols) <= INT32_MAX, "sizes below 2^31", tuple(shape))
    check(
        values.is_floating_point() and values.dim() == 1,
        "values (nnz,) in floating point",
        f"{values.dtype} of shape {tuple(values.shape)}",
    )
    _check_rows("CSRWeight", values.numel(), crow, col, rows, cols)


def check_int8(values: Tensor, scales: Tensor, crow: Tensor, col: Tensor, shape) -> None:
    """Raise ValueError unless the parts are an int8 CSR of a linear weight of `shape`.

    Args:
        values: `(nnz,)`, int8.
        scales: `(rows,)`, float32, finite and above 0; rows = shape[0].
        crow: As for `check_csr`.
        col: As for `check_csr`.
        shape: Shape of the dense weight, two dimensions.
    """
    _check_scaled("Int8CSRWeight", values, scales, shape)
    check(values.dim() == 1, "values (nnz,)", f"shape {tuple(values.shape)}", "Int8CSRWeight")
    _check_rows("Int8CSRWeight", values.numel(), crow, col, *shape)


def check_int8_block(values: Tensor, scales: Tensor, crow: Tensor, col: Tensor, shape) -> None:
    """Raise ValueError unless the parts are an int8 block weight of a linear weight of `shape`.

    Args:
        values: `(n_blocks, R, C)`, int8.
        scales: `(rows,)`, float32, finite and above 0; rows = shape[0].
        crow: As for `check_block`.
        col: As for `check_block`.
        shape: Shape of the dense weight, two dimensions.
    """
    op = "Int8BlockWeight"
    _check_scaled(op, values, scales, shape)
    check(values.dim() == 3, "values (n_blocks, R, C)", f"shape {tuple(values.shape)}", op)
    _check_block_size(op, values, shape)
    rows, cols, _ = block_grid(*shape, tuple(values.shape[1:]))
    _check_rows(op, values.shape[0], crow, col, rows, cols)


# Sums of this many products of -128 and 127 fit an int32.
DYNAMIC_COLUMNS = INT32_MAX // (128 * 127)


def dynamic_obstacle(block_cols: int, cols: int) -> str:
    """Why blocks of so many columns cannot be multiplied with int8 activations, or ""."""
    if block_cols % 4:
        return f"expected blocks of a multiple of 4 columns, got {block_cols}"
    fits = cols <= DYNAMIC_COLUMNS
    return "" if fits else f"expected at most {DYNAMIC_COLUMNS} in_features, got {cols}"


def check_dynamic(values: Tensor, shape) -> None:
    """Raise ValueError unless int8 blocks `(n_blocks, R, C)` can meet int8 activations.

    What `check_int8_block` accepted is taken for granted.
    """
    obstacle = dynamic_obstacle(values.shape[2], shape[1])
    if obstacle:
        raise ValueError(f"DynamicInt8BlockWeight: {obstacle}")


def check_int8_nm(
    op: str, values: Tensor, scales: Tensor, index: Tensor, shape, n, m, kind
) -> None:
    """Raise ValueError unless the parts are an 8-bit N:M weight of a linear weight of `shape`.

    Args:
        op: Who asks.
        values: `(out, slots)`, of the dtype `kind`: int8, or uint8 for the bits of float8 e4m3.
        scales: `(out,)`, float32, finite and above 0.
        index: As for `check_nm`.
        shape: Shape of the dense weight, two dimensions.
        n: Kept per group.
        m: Size of a group; at most 16.
        kind: See values.
    """
    _check_scaled(op, values, scales, shape, kind)
    if kind == torch.uint8 and not values.is_meta:
        check(not bool((values & 127 == 127).any()), "float8 values without NaN", "NaN", op)
    _check_nm_parts(op, values, index, torch.Size(shape), n, m, kind)


def _check_scaled(op: str, values: Tensor, scales: Tensor, shape, kind=torch.int8) -> None:
    check = _checker(op)
    check(len(shape) == 2, "the weight of a linear layer (out, in)", tuple(shape))
    check(max(shape) <= INT32_MAX, "sizes below 2^31", tuple(shape))
    check(values.dtype == kind, f"values of {str(kind).removeprefix('torch.')}", values.dtype)
    fits = scales.dtype == torch.float32 and tuple(scales.shape) == (shape[0],)
    check(fits, f"scales ({shape[0]},) of float32", f"{scales.dtype} {tuple(scales.shape)}")
    if not scales.is_meta:
        check(bool((scales.isfinite() & (scales > 0)).all()), "scales above 0", "others")


def _check_rows(op: str, nnz: int, crow: Tensor, col: Tensor, rows: int, cols: int) -> None:
    check = _checker(op)
    for name, index in (("crow", crow), ("col", col)):
        check(
            index.dtype == torch.int32 and index.dim() == 1,
            f"{name} int32 with one dimension",
            f"{index.dtype} of shape {tuple(index.shape)}",
        )
    check(crow.numel() == rows + 1, f"crow of {rows + 1} entries (out + 1)", crow.numel())
    check(nnz <= rows * cols, f"values for at most {rows} x {cols} positions", nnz)
    check(col.numel() == nnz, f"col of {nnz} entries like values", col.numel())
    if crow.is_meta:
        return
    first, last = int(crow[0]), int(crow[-1])
    check(first == 0 and last == nnz, f"crow from 0 to nnz = {nnz}", f"from {first} to {last}")
    falling = int((crow[1:] < crow[:-1]).sum())
    check(falling == 0, "crow that never falls", f"{falling} falling steps")
    if nnz:
        low, high = int(col.min()), int(col.max())
        check(low >= 0 and high < cols, f"columns in [0, {cols})", f"[{low}, {high}]")
        same_row = torch.ones(nnz, dtype=torch.bool, device=col.device)
        starts = crow[:-1].long()
        same_row[starts[starts < nnz]] = False
        wrong = int(((col[1:] <= col[:-1]) & same_row[1:]).sum())
        check(wrong == 0, "columns that rise strictly inside each row", f"{wrong} that do not")


def check_block(values: Tensor, crow: Tensor, col: Tensor, shape, groups: int = 1) -> None:
    """Raise ValueError unless the parts are a canonical block weight of `shape`.

    Args:
        values: `(n_blocks, R, C)`, floating point.
        crow: `(rows of blocks + 1,)`, int32, from 0 to n_blocks, never falling.
        col: `(n_blocks,)`, int32, strictly rising inside each row of blocks.
        shape: Shape of the dense weight, two or four dimensions.
        groups: Groups of the convolution; more than one needs R that divides out / groups.
    """
    check, shape = _checker("BlockWeight"), torch.Size(shape)

    check(len(shape) in (2, 4), "a shape of 2 or 4 dimensions", tuple(shape))
    check(
        values.is_floating_point() and values.dim() == 3,
        "values (n_blocks, R, C) in floating point",
        f"{values.dtype} of shape {tuple(values.shape)}",
    )
    _check_block_size("BlockWeight", values, shape)
    block = tuple(values.shape[1:])
    fault = group_misfit(shape, block, groups)
    check(not fault, "blocks that stay inside a group of the convolution", fault)
    rows, cols, _ = block_grid(shape[0], shape[1], block, groups)
    _check_rows("BlockWeight", values.shape[0], crow, col, rows, cols * shape[2:].numel())


def _check_block_size(op: str, values: Tensor, shape) -> None:
    """No side may be 0 or longer than the weight: kernels reserve memory for a whole block."""
    fits = all(0 < side <= size for side, size in zip(values.shape[1:], shape[:2], strict=True))
    wanted = f"values (n_blocks, R, C) with R in [1, {shape[0]}] and C in [1, {shape[1]}]"
    check(fits, wanted, f"shape {tuple(values.shape)}", op)


def group_misfit(shape, block, groups: int) -> str:
    """Say how blocks would reach over the edge of a group of a convolution; empty if not."""
    if groups == 1 or shape[0] // groups % block[0] == 0:
        return ""
    return f"{block[0]} rows in groups of {shape[0] // groups}"


def block_misfit(pattern, shape, groups: int = 1) -> str:
    """Say why a pattern cannot be stored in blocks; empty if it can."""
    if not isinstance(pattern, (Block, Vector)) or 0 in shape[:2]:
        return f"{pattern} for shape {tuple(shape)}"
    return group_misfit(shape, pattern.tile(shape)[:2], groups)


def nm_misfit(pattern, shape) -> str:
    """Say why a pattern cannot be stored as N:M; empty if it can."""
    if not isinstance(pattern, NM) or pattern.m > 16:
        return f"{pattern}"
    tail = shape[1] % pattern.m
    if shape[1] < 1 or 0 < tail < pattern.n:
        return f"{pattern} with {shape[1]} inputs"
    return ""


def check_nm(values: Tensor, index: Tensor, shape, n: int, m: int) -> None:
    """Raise ValueError unless the parts are an N:M weight of `shape`.

    Args:
        values: `(out, slots)`, floating point.
        index: `(out, bytes)` uint8, positions that rise inside each group; see `ops.nm`.
        shape: Shape of the dense weight, two or four dimensions.
        n: Kept per group.
        m: Size of a group; at most 16.
    """
    shape = torch.Size(shape)
    check(len(shape) in (2, 4), "a shape of 2 or 4 dimensions", tuple(shape), "NMWeight")
    _check_nm_parts("NMWeight", values, index, shape, n, m)


def _check_nm_parts(op, values: Tensor, index: Tensor, shape, n: int, m: int, kind=None) -> None:
    """`kind` is the dtype of values, None for floating point."""
    check = _checker(op)
    fault = nm_misfit(NM(n, m), shape)
    check(not fault, "an N:M pattern that fits", fault)
    slots = slot_count(shape[1], n, m, shape[2:].numel())
    for name, t, width, stored in (
        ("values", values, slots, kind),
        ("index", index, -(-slots * slot_bits(m) // 8), torch.uint8),
    ):
        got = f"{t.dtype} of shape {tuple(t.shape)}"
        text = str(stored).removeprefix("torch.") if stored else "floating point"
        fits = t.dtype == stored if stored else t.is_floating_point()
        wanted = f"{name} ({shape[0]}, {width}) in {text}"
        check(fits and tuple(t.shape) == (shape[0], width), wanted, got)
    check(shape[0] * slots <= INT32_MAX, "fewer than 2^31 values", shape[0] * slots)
    if not index.is_meta:
        fault = index_fault(index, shape[1], n, m, shape[2:].numel())
        check(not fault, "positions that rise inside each group and stay in it", fault)
