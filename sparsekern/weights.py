"""Sparse weights by format: what a sparse layer stores and how it multiplies.

`csr` takes any pattern, `block` those of blocks and vectors, `nm` those of N:M. `sparse_weight`
picks the format that fits a pattern best.
"""

import torch
from torch import Tensor

from .ops._library import row_of_each
from .ops.block import block_plan, blocks_to_dense, call_block_linear, dense_to_blocks, split_blocks
from .ops.block_conv import call_block_conv2d
from .ops.conv import add_residual, call_csr_conv2d
from .ops.csr import call_csr_linear, csr_plan
from .ops.nm import call_nm_linear, nm_plan, nm_to_dense, pack_index, slot_columns
from .ops.nm_conv import call_nm_conv2d
from .patterns import NM, Block, parse
from .tiles import as_3d
from .weight_base import SparseWeight, dense_weight
from .weight_checks import block_misfit, check, check_block, check_csr, check_nm, nm_misfit


class CSRWeight(SparseWeight):
    """Weights in compressed sparse rows, for any pattern.

    Attributes:
        values: Parameter `(nnz,)`, row by row, columns rising.
        crow: Tensor `(out + 1,)` int32, where each row starts in `values`.
        col: Tensor `(nnz,)` int32, column of each value. A convolution weight
            `(out, in / groups, kh, kw)` counts over its last three dimensions flattened.
    """

    format = "csr"
    parts = ("values", "crow", "col")

    def __init__(self, values, crow, col, shape, pattern="unstructured", groups=1, plans=True):
        check_csr(values, crow, col, shape)
        self._set_up(shape, pattern, groups, plans, values, crow=crow, col=col)

    @classmethod
    def from_parts(cls, values, crow, col, shape, pattern="unstructured", groups=1) -> "CSRWeight":
        """Build from CSR parts; see `check_csr` for what they must be (ValueError otherwise)."""
        return cls(values, crow, col, shape, pattern, groups)

    @classmethod
    def from_dense(cls, weight, mask=None, pattern="unstructured", groups=1) -> "CSRWeight":
        """Keep the weights where `mask` is True; without a mask, those that are not zero.

        Args:
            weight: `(out, in)` or `(out, in / groups, kh, kw)`, floating point.
            mask: Boolean, same shape, True = kept.
            pattern: Name of the pattern, recorded only.
            groups: Groups of the convolution.
        """
        weight, kept = dense_weight(cls.__name__, weight, mask)
        cols = weight.shape[1:].numel()
        flat, kept = (t.reshape(weight.shape[0], cols) for t in (weight, kept))
        col = kept.nonzero()[:, 1].to(torch.int32)
        return cls(flat[kept], _row_starts(kept), col, weight.shape, pattern, groups)

    def rows(self) -> Tensor:
        """Row of each value, `(nnz,)` int64."""
        return row_of_each(self.crow)

    def gather(self, dense: Tensor) -> Tensor:
        """The values `(nnz,)` of a dense weight at the stored positions."""
        return dense.reshape(self.shape[0], -1)[self.rows(), self.col.long()]

    def _dense(self, values: Tensor) -> Tensor:
        flat = values.new_zeros(self.shape[0], self.shape[1:].numel())
        return flat.index_put((self.rows(), self.col.long()), values).view(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """act(x W^T + b) for x `(..., in)`; bias `(out,)`."""
        b = self.__dict__
        return call_csr_linear(
            x, self._parameters["values"], b["crow"], b["col"], bias, b["plan"], b["plan_t"],
            activation,
        )  # fmt: skip

    def conv2d(self, x, bias, stride, padding, dilation, activation: str, residual=None) -> Tensor:
        """act(conv2d(x, W) + b + residual), x `(n, in, h, w)`; contiguous `(n, out, oh, ow)`."""
        geometry = (self.shape[2:], stride, padding, dilation, self.groups)
        return call_csr_conv2d(x, *self._arguments(bias), *geometry, activation, residual)

    def _arguments(self, bias):
        # Straight from the dicts: an attribute of a module costs 0.4 us, a small layer 5 us.
        b = self.__dict__
        return self._parameters["values"], b["crow"], b["col"], bias, b["plan"], b["plan_t"]

    def _check(self, parts) -> None:
        check_csr(*parts.values(), self.shape)

    def _plan(self, transpose: bool) -> Tensor:
        cols = self.shape[1:].numel()
        # Only the bfloat16 kernels read pairs of columns.
        pairs = not transpose and self.dtype == torch.bfloat16 and len(self.shape) == 2
        return csr_plan(self.crow, self.col, cols, self.groups, self.taps, transpose, pairs)

    def _plan_depends(self) -> tuple:
        """As for every weight; bfloat16 has a schedule of its own."""
        return (*super()._plan_depends(), self.dtype == torch.bfloat16)


def _row_starts(kept: Tensor) -> Tensor:
    """Where each row of a boolean matrix starts among its True entries, `(rows + 1,)` int32."""
    crow = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=kept.device)
    crow[1:] = kept.sum(1).cumsum(0)
    return crow


class BlockWeight(SparseWeight):
    """Weights in dense blocks of R outputs x C inputs; in a convolution at each kernel position.

    A kept block holds all its R * C values, also those that are 0. The sizes need not be multiples
    of the block: what lies beyond them is 0, never read, and its gradient is 0.

    Attributes:
        values: Parameter `(n_blocks, R, C)`, by rows of blocks, columns rising.
        block_crow: Tensor `(rows of blocks + 1,)` int32, where each row of blocks starts.
        block_col: Tensor `(n_blocks,)` int32, column of each block. In a convolution it counts
            (block of input channels, kernel position), as `sparsekern.patterns` numbers its units.
    """

    format = "block"
    parts = ("values", "block_crow", "block_col")

    def __init__(self, values, block_crow, block_col, shape, pattern, groups=1, plans=True):
        check_block(values, block_crow, block_col, shape, groups)
        indices = {"block_crow": block_crow, "block_col": block_col}
        self._set_up(shape, pattern, groups, plans, values, **indices)

    @classmethod
    def from_dense(cls, weight, mask=None, pattern="block:16x16", groups=1) -> "BlockWeight":
        """Keep the blocks in which `mask` (by default: the weight is not 0) holds anywhere.

        Args:
            weight: `(out, in)` or `(out, in / groups, kh, kw)`, floating point.
            mask: Boolean, same shape, True = kept.
            pattern: A block or vector pattern; gives the block, cut to the size of the weight.
            groups: Groups of the convolution.
        """
        weight, kept = dense_weight(cls.__name__, weight, mask)
        fault = block_misfit(parse(pattern), weight.shape, groups)
        check(not fault, "a pattern of blocks or vectors that fits", fault, cls.__name__)
        block = parse(pattern).tile(weight.shape)[:2]
        touched = split_blocks(as_3d(kept), block, groups).flatten(3).any(3).flatten(1)
        crow, col = _row_starts(touched), touched.nonzero()[:, 1].to(torch.int32)
        values = dense_to_blocks(as_3d(weight), crow, col, block, groups)
        return cls(values, crow, col, weight.shape, pattern, groups)

    @property
    def nnz(self) -> int:
        """Number of weights that are stored, without what blocks hold beyond the edges."""
        if self.block_col.is_meta:
            return min(self.values.numel(), self.shape.numel())
        return int(self.mask().sum())

    def gather(self, dense: Tensor) -> Tensor:
        """The values `(n_blocks, R, C)` of a dense weight at the stored blocks."""
        block = tuple(self.values.shape[1:])
        return dense_to_blocks(as_3d(dense), self.block_crow, self.block_col, block, self.groups)

    def _dense(self, values: Tensor) -> Tensor:
        index = (self.block_crow, self.block_col)
        dense = blocks_to_dense(
            "BlockWeight", values, *index, *self.shape[:2], self.groups, self.taps
        )
        return dense.view(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """act(x W^T + b) for x `(..., in)`; bias `(out,)`."""
        b = self.__dict__
        return call_block_linear(
            x, self._parameters["values"], b["block_crow"], b["block_col"], bias, b["plan"],
            b["plan_t"], self.shape[0], activation,
        )  # fmt: skip

    def conv2d(self, x, bias, stride, padding, dilation, activation: str, residual=None) -> Tensor:
        """act(conv2d(x, W) + b + residual), x `(n, in, h, w)`; contiguous `(n, out, oh, ow)`."""
        geometry = (self.shape[2:], stride, padding, dilation, self.groups)
        if residual is None:
            return call_block_conv2d(x, *self._arguments(bias), *geometry, activation)
        y = call_block_conv2d(x, *self._arguments(bias), *geometry, "none")
        return add_residual("block_conv2d", y, residual, activation)

    def _arguments(self, bias):
        b = self.__dict__
        index = (b["block_crow"], b["block_col"])
        return self._parameters["values"], *index, bias, b["plan"], b["plan_t"], self.shape[0]

    def _check(self, parts) -> None:
        check_block(*parts.values(), self.shape, self.groups)

    def _settle(self) -> None:
        block = tuple(self.values.shape[1:])
        if block != parse(self.pattern).tile(self.shape)[:2]:  # parts bring no name of a pattern
            self.pattern = str(Block(*block))

    def _plan(self, transpose: bool) -> Tensor:
        sizes = (*self.shape[:2], *self.values.shape[1:])
        return block_plan(
            self.block_crow, self.block_col, *sizes, self.groups, self.taps, transpose
        )


class NMWeight(SparseWeight):
    """N of every M weights along the input dimension; in a convolution at each kernel position.

    Every group holds exactly N values; where a dense weight has fewer nonzeros, zeros are stored.

    Attributes:
        values: Parameter `(out, slots)`; slots count (group of M inputs, kernel position, N).
        index: Tensor `(out, bytes)` uint8: where in its group each value lies, slot by slot, 2 bits
            each if M <= 4, else 4, lowest bits first, every row from a byte of its own.
        n, m: Kept weights per group, and its size (at most 16).
    """

    format = "nm"
    parts = ("values", "index")

    def __init__(self, values, index, shape, pattern, groups=1, plans=True):
        pattern = parse(pattern)
        check(isinstance(pattern, NM), "an N:M pattern", pattern, "NMWeight")
        check_nm(values, index, shape, pattern.n, pattern.m)
        self._set_up(shape, pattern, groups, False, values, index=index)
        self.n, self.m = pattern.n, pattern.m
        if plans:
            self._make_plans(training=False)

    @classmethod
    def from_dense(cls, weight, mask=None, pattern="2:4", groups=1) -> "NMWeight":
        """Keep the weights where `mask` is True (by default: those not 0), padded to N per group.

        Raises:
            ValueError: A group holds more than N, or the pattern does not fit the shape.
        """
        weight, kept = dense_weight(cls.__name__, weight, mask)
        fault = nm_misfit(parse(pattern), weight.shape)
        check(not fault, "an N:M pattern that fits", fault, cls.__name__)
        n, m = parse(pattern).n, parse(pattern).m
        kept = as_3d(kept)
        pad = (0, 0, 0, -kept.shape[1] % m)
        inside = torch.nn.functional.pad(torch.ones_like(kept), pad)
        # 2 for kept, 1 for zeros that may fill up, 0 beyond the edge; stable, so the first zeros.
        rank = (torch.nn.functional.pad(kept, pad).byte() + inside).unflatten(1, (-1, m))
        most = int((rank == 2).sum(2).max()) if rank.numel() else 0
        check(most <= n, f"at most {n} weights in each group of {m}", most, cls.__name__)
        chosen = rank.argsort(dim=2, descending=True, stable=True)[:, :, :n].sort(dim=2).values
        index = pack_index(chosen.transpose(2, 3).flatten(1), m)
        columns = slot_columns(cls.__name__, index, weight.shape[1], n, m, weight.shape[2:].numel())
        values = weight.flatten(1).gather(1, columns)
        if mask is not None:  # what fills up is 0, whatever the dense weight has there
            values = values * mask.reshape(weight.shape).flatten(1).gather(1, columns)
        return cls(values, index, weight.shape, pattern, groups)

    def gather(self, dense: Tensor) -> Tensor:
        """The values `(out, slots)` of a dense weight at the stored positions."""
        return dense.reshape(self.shape[0], -1).gather(1, self._columns())

    def _columns(self) -> Tensor:
        return slot_columns("NMWeight", self.index, self.shape[1], self.n, self.m, self.taps)

    def _dense(self, values: Tensor) -> Tensor:
        sizes = (self.shape[1], self.n, self.m, self.taps)
        return nm_to_dense("NMWeight", values, self.index, *sizes).view(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """act(x W^T + b) for x `(..., in)`; bias `(out,)`."""
        b = self.__dict__
        return call_nm_linear(
            x, self._parameters["values"], b["index"], bias, b["plan"], b["plan_t"], self.n, self.m,
            activation,
        )  # fmt: skip

    def conv2d(self, x, bias, stride, padding, dilation, activation: str, residual=None) -> Tensor:
        """act(conv2d(x, W) + b + residual), x `(n, in, h, w)`; contiguous `(n, out, oh, ow)`."""
        geometry = (self.shape[2:], stride, padding, dilation, self.groups)
        if residual is None:
            return call_nm_conv2d(x, *self._arguments(bias), *geometry, activation)
        y = call_nm_conv2d(x, *self._arguments(bias), *geometry, "none")
        return add_residual("nm_conv2d", y, residual, activation)

    def _follow(self, pattern) -> None:
        pattern = parse(pattern)
        check(isinstance(pattern, NM), "an N:M pattern", pattern, type(self).__name__)
        super()._follow(pattern)
        self.n, self.m = pattern.n, pattern.m

    def _arguments(self, bias):
        b = self.__dict__
        return (
            self._parameters["values"], b["index"], bias, b["plan"], b["plan_t"], self.n, self.m,
        )  # fmt: skip

    def _check(self, parts) -> None:
        check_nm(*parts.values(), self.shape, self.n, self.m)

    def _plan(self, transpose: bool) -> Tensor:
        sizes = (*self.shape[:2], self.n, self.m)
        return nm_plan(self.index, *sizes, self.groups, self.taps, transpose)


FORMATS = {"csr": CSRWeight, "block": BlockWeight, "nm": NMWeight}


def fitting_formats(pattern, shape, groups: int = 1) -> list[str]:
    """The formats that can store a pattern, the one that is usually fastest first."""
    pattern = parse(pattern)
    if nm_misfit(pattern, shape) == "":
        return ["nm", "csr"]
    if block_misfit(pattern, shape, groups) == "":
        # One row alone shares no loads with others; csr sorts such rows by their counts instead.
        return ["block", "csr"] if pattern.tile(shape)[0] > 1 else ["csr", "block"]
    return ["csr"]


def check_format(op: str, format: str, pattern, shape, groups: int = 1) -> str:
    """The format to use: the one asked for if it fits, the best one for `auto`."""
    fitting = fitting_formats(pattern, shape, groups)
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"{op}: expected format to be auto, {', '.join(FORMATS)}, got {format!r}")
    if format != "auto" and format not in fitting:
        raise ValueError(
            f"{op}: expected a format that stores pattern {pattern} for shape {tuple(shape)} "
            f"({', '.join(fitting)}), got {format!r}"
        )
    return fitting[0] if format == "auto" else format
