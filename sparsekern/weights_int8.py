"""The surviving weights of a linear layer in 8 bits with one scale per output; for inference."""

import torch
from torch import Tensor

from .ops._library import row_of_each
from .ops.block_int8 import call_block_linear_int8, dequantize_blocks
from .ops.block_int8_dynamic import call_block_linear_int8_dynamic
from .ops.csr_int8 import call_csr_linear_int8, dequantize
from .ops.nm_int8 import LARGEST, call_nm_linear_int8, dequantize_rows, to_bytes
from .patterns import NM, parse
from .weight_base import SparseWeight
from .weight_checks import check, check_dynamic, check_int8, check_int8_block, check_int8_nm
from .weights import BlockWeight, CSRWeight, NMWeight

LEVELS = 127  # -127..127, so that every value has its negative


class _Int8Weight(SparseWeight):
    """What int8 weights of all formats share.

    Symmetric, scale = largest absolute value of the row / 127, rounded to nearest. A subclass gives
    the format with float values as `wide`, and `quantized` and `dequantized`.
    """

    wide: type[SparseWeight]

    @classmethod
    def quantized(cls, values: Tensor, index: tuple[Tensor, ...], shape) -> tuple[Tensor, Tensor]:
        """Values of int8 and scales `(out,)` of float values; ValueError unless all are finite."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """The values in float32."""
        raise NotImplementedError

    @classmethod
    def from_dense(cls, weight, mask=None, pattern=None, groups=1):
        """As `from_dense` of the format with float values, quantized; errors as `from_weight`."""
        options = {} if pattern is None else {"pattern": pattern}
        return cls.from_weight(cls.wide.from_dense(weight, mask, groups=groups, **options))

    @classmethod
    def from_weight(cls, weight: SparseWeight):
        """Quantize a weight of a linear layer with float values.

        Raises:
            ValueError: A value is NaN or infinite, or the weight is that of a convolution.
        """
        quantized = cls.quantized(cls._read(weight), weight.indices(), weight.shape)
        return cls(*quantized, *weight.indices(), weight.shape, weight.pattern)

    @staticmethod
    def _read(weight: SparseWeight) -> Tensor:
        """The values that count."""
        return weight.values.detach()

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32, whatever the dtype of the input is."""
        return torch.float32

    def indices(self) -> tuple[Tensor, ...]:
        """The tensors that say where the values belong: not the scales."""
        return tuple(getattr(self, name) for name in self.parts[2:])

    def refilled(self, values: Tensor):
        """As for every weight; the values are quantized."""
        index = tuple(t.cpu() for t in self.indices())
        quantized = self.quantized(values, index, self.shape)
        return type(self)(*quantized, *index, self.shape, self.pattern, plans=False)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of what is stored now; the quantization error stays."""
        return self._dense(self.dequantized())

    def prepare_training(self):
        """Refused: int8 values take no optimizer steps."""
        raise RuntimeError(
            f"{type(self).__name__}: expected inference, got a request to train; train first, "
            "quantize then"
        )

    def conv2d(self, *arguments):
        """Refused: this is the weight of a linear layer."""
        raise RuntimeError(f"{type(self).__name__}: expected a linear layer, got a convolution")

    def _refuse_training(self) -> None:
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__}: expected a model in eval mode, got one in training mode; "
                "call model.eval()"
            )

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:  # they are no activations: half would lose bits
            self.scales = scales.to(self.scales.device)
        return self


class Int8CSRWeight(_Int8Weight, CSRWeight):
    """The surviving weights of a linear layer as int8, with one float32 scale per output.

    Attributes:
        values: Tensor `(nnz,)` int8, row by row, columns rising.
        scales: Tensor `(out,)` float32, positive; stays float32 when the layer changes its dtype.
        crow, col, shape, pattern, plan: As in `CSRWeight`.
    """

    format = "csr_int8"
    parts = ("values", "scales", "crow", "col")
    wide = CSRWeight

    def __init__(self, values, scales, crow, col, shape, pattern="unstructured", plans=True):
        check_int8(values, scales, crow, col, shape)
        self._set_up(shape, pattern, 1, plans, values, scales=scales, crow=crow, col=col)

    @classmethod
    def from_parts(cls, values, scales, crow, col, shape, pattern="unstructured"):
        """Build from the parts; see `check_int8` for what they must be (ValueError otherwise)."""
        return cls(values, scales, crow, col, shape, pattern)

    @classmethod
    def quantized(cls, values, index, shape):
        """As for every int8 weight, values `(nnz,)`."""
        return quantize_rows(values, index[0])

    def dequantized(self) -> Tensor:
        """The values in float32, `(nnz,)`."""
        return dequantize(self.values, self.scales, self.crow)

    def linear(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """act(x W^T + b) for x `(..., in)` float32 or bfloat16; bias `(out,)`."""
        self._refuse_training()
        b = self.__dict__
        index = (b["values"], b["scales"], b["crow"], b["col"])
        return call_csr_linear_int8(x, *index, bias, b["plan"], activation)

    def _check(self, parts) -> None:
        check_int8(*parts.values(), self.shape)


class Int8BlockWeight(_Int8Weight, BlockWeight):
    """The kept blocks of a linear layer as int8, with one float32 scale per output.

    Attributes:
        values: Tensor `(n_blocks, R, C)` int8, by rows of blocks, columns rising.
        scales: Tensor `(out,)` float32, positive; stays float32 when the layer changes its dtype.
        block_crow, block_col, shape, pattern, plan: As in `BlockWeight`.
    """

    format = "block_int8"
    parts = ("values", "scales", "block_crow", "block_col")
    wide = BlockWeight
    _linear = staticmethod(call_block_linear_int8)

    def __init__(self, values, scales, block_crow, block_col, shape, pattern, plans=True):
        check_int8_block(values, scales, block_crow, block_col, shape)
        indices = {"block_crow": block_crow, "block_col": block_col}
        self._set_up(shape, pattern, 1, plans, values, scales=scales, **indices)

    @staticmethod
    def _read(weight: BlockWeight) -> Tensor:
        return weight.gather(weight.to_dense().detach())  # 0 where a block leaves the matrix

    @classmethod
    def quantized(cls, values, index, shape):
        """As for every int8 weight, values `(n_blocks, R, C)`."""
        return quantize_blocks(values, index[0], shape[0])

    def dequantized(self) -> Tensor:
        """The values in float32, `(n_blocks, R, C)`."""
        return dequantize_blocks(self.values, self.scales, self.block_crow)

    def linear(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """act(x W^T + b) for x `(..., in)` float32 or bfloat16; bias `(out,)`."""
        self._refuse_training()
        b = self.__dict__
        index = (b["values"], b["scales"], b["block_crow"], b["block_col"])
        return self._linear(x, *index, bias, b["plan"], self.shape[0], activation)

    def _check(self, parts) -> None:
        check_int8_block(*parts.values(), self.shape)


class DynamicInt8BlockWeight(Int8BlockWeight):
    """As `Int8BlockWeight`, and every call quantizes its input to int8 too, token by token.

    Products are int8, sums int32; see `ops.block_int8_dynamic`. Blocks have a multiple of 4 columns
    and the matrix at most `DYNAMIC_COLUMNS`.
    """

    format = "block_int8_dynamic"
    _linear = staticmethod(call_block_linear_int8_dynamic)

    def __init__(self, values, scales, block_crow, block_col, shape, pattern, plans=True):
        super().__init__(values, scales, block_crow, block_col, shape, pattern, plans)
        check_dynamic(values, shape)

    @property
    def product_dtype(self) -> torch.dtype:
        """int8."""
        return torch.int8

    def _check(self, parts) -> None:
        super()._check(parts)
        check_dynamic(parts["values"], self.shape)


class Int8NMWeight(_Int8Weight, NMWeight):
    """N of every M weights of a linear layer as int8, with one float32 scale per output.

    Attributes:
        values: Tensor `(out, slots)` int8, slot by slot as in `NMWeight`.
        scales: Tensor `(out,)` float32, positive; stays float32 when the layer changes its dtype.
        index, n, m, shape, pattern, plan: As in `NMWeight`.
    """

    format = "nm_int8"
    parts = ("values", "scales", "index")
    wide = NMWeight
    kind = torch.int8  # of the values
    dynamic = False  # whether tokens are rounded as well

    def __init__(self, values, scales, index, shape, pattern, plans=True):
        pattern, op = parse(pattern), type(self).__name__
        check(isinstance(pattern, NM), "an N:M pattern", pattern, op)
        check_int8_nm(op, values, scales, index, shape, pattern.n, pattern.m, self.kind)
        self._set_up(shape, pattern, 1, False, values, scales=scales, index=index)
        self.n, self.m = pattern.n, pattern.m
        if plans:
            self._make_plans(training=False)

    @classmethod
    def quantized(cls, values, index, shape):
        """As for every 8-bit weight, values `(out, slots)`."""
        values = values.float()
        _refuse_not_finite(values)
        largest = values.abs().amax(1) if values.shape[1] else values.new_zeros(len(values))
        scales = (largest / LARGEST[cls.kind]).clamp_min(torch.finfo(torch.float32).tiny)
        return to_bytes(values / scales[:, None], cls.kind), scales

    def dequantized(self) -> Tensor:
        """The values in float32, `(out, slots)`."""
        return dequantize_rows(self.values, self.scales)

    def linear(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """act(x W^T + b) for x `(..., in)` in floating point; bias `(out,)`."""
        self._refuse_training()
        b = self.__dict__
        weight = (b["values"], b["scales"], b["index"])
        sizes = (self.n, self.m, self.dynamic)
        return call_nm_linear_int8(x, *weight, bias, b["plan"], *sizes, activation)

    def _check(self, parts) -> None:
        name = type(self).__name__
        check_int8_nm(name, *parts.values(), self.shape, self.n, self.m, self.kind)


class Float8NMWeight(Int8NMWeight):
    """N of every M weights of a linear layer as float8 e4m3, with one float32 scale per output.

    Attributes:
        values: Tensor `(out, slots)` uint8 that holds the bits, so that a change of the dtype of
            the layer leaves them alone.
        scales, index, n, m, shape, pattern, plan: As in `Int8NMWeight`.
    """

    format = "nm_float8"
    kind = torch.uint8


class DynamicInt8NMWeight(Int8NMWeight):
    """As `Int8NMWeight`, and every call quantizes its input to int8 too, token by token.

    See `ops.nm_int8`; on a GPU the tensor cores then multiply 8-bit numbers.
    """

    format = "nm_int8_dynamic"
    dynamic = True


class DynamicFloat8NMWeight(Float8NMWeight):
    """As `Float8NMWeight`, and every call quantizes its input to float8 too, token by token."""

    format = "nm_float8_dynamic"
    dynamic = True


INT8 = {weight.wide: weight for weight in (Int8CSRWeight, Int8BlockWeight, Int8NMWeight)}
QUANTIZED = {torch.int8: INT8, torch.float8_e4m3fn: {NMWeight: Float8NMWeight}}
DYNAMIC = {
    Int8BlockWeight: DynamicInt8BlockWeight,
    Int8NMWeight: DynamicInt8NMWeight,
    Float8NMWeight: DynamicFloat8NMWeight,
}


def quantize_rows(values: Tensor, crow: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 values `(nnz,)` and scales `(rows,)` of CSR values.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    return _quantize(values, row_of_each(crow), crow.numel() - 1)


def quantize_blocks(values: Tensor, crow: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 values `(n_blocks, R, C)` and scales `(rows,)` of blocks of a matrix.

    Values beyond the last row are to be 0. Errors as `quantize_rows`.
    """
    height, width = values.shape[1:]
    inside = torch.arange(height, device=values.device)
    row = (row_of_each(crow)[:, None] * height + inside)[:, :, None].expand(-1, -1, width)
    quantized, scales = _quantize(values.flatten(), row.flatten(), (crow.numel() - 1) * height)
    return quantized.view(values.shape), scales[:rows].clone()


def _quantize(values: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    values = values.float()
    _refuse_not_finite(values)
    largest = values.new_zeros(rows).scatter_reduce(0, row, values.abs(), "amax")
    # A row of zeros, or of numbers too small to be divided by 127, has no scale of its own.
    scales = (largest / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales[row]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales


def _refuse_not_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError("quantize: expected finite weights, got NaN or infinity among them")
