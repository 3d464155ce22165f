"""Int8CSRWeight: the surviving weights of a linear layer as int8 with one scale per output."""

import torch
from torch import Tensor

from .ops.csr_int8 import csr_linear_int8, dequantize
from .weight_checks import check_int8
from .weights import CSRWeight

LEVELS = 127  # -127..127, so that every value has its negative


class Int8CSRWeight(CSRWeight):
    """The surviving weights of a linear layer as int8, with one float32 scale per output.

    Symmetric, scale = largest absolute value of the row / 127, rounded to nearest. For inference.

    Attributes:
        values: Buffer `(nnz,)` int8, row by row, columns rising.
        scales: Buffer `(out,)` float32, positive; stays float32 when the layer changes its dtype.
        crow, col, shape, pattern, plan: As in `CSRWeight`.
    """

    format = "csr_int8"
    parts = ("values", "scales", "crow", "col")

    def __init__(self, values, scales, crow, col, shape, pattern="unstructured", plans=True):
        check_int8(values, scales, crow, col, shape)
        self._set_up(shape, pattern, 1, plans, values, scales=scales, crow=crow, col=col)

    @classmethod
    def from_parts(cls, values, scales, crow, col, shape, pattern="unstructured"):
        """Build from the parts; see `check_int8` for what they must be (ValueError otherwise)."""
        return cls(values, scales, crow, col, shape, pattern)

    @classmethod
    def from_dense(cls, weight, mask=None, pattern="unstructured", groups=1) -> "Int8CSRWeight":
        """As `CSRWeight.from_dense`, quantized; ValueError as from `from_weight`."""
        return cls.from_weight(CSRWeight.from_dense(weight, mask, pattern, groups))

    @classmethod
    def from_weight(cls, weight: CSRWeight) -> "Int8CSRWeight":
        """Quantize a weight of a linear layer with float values.

        Raises:
            ValueError: A value is NaN or infinite, or the weight is that of a convolution.
        """
        values, scales = quantize_rows(weight.values.detach(), weight.crow)
        return cls(values, scales, *weight.indices(), weight.shape, weight.pattern)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32, whatever the dtype of the input is."""
        return torch.float32

    def indices(self) -> tuple[Tensor, ...]:
        """The buffers that say where the values belong: crow and col, not the scales."""
        return self.crow, self.col

    def refilled(self, values: Tensor) -> "Int8CSRWeight":
        """As for every weight; the values are quantized."""
        crow, col = (index.cpu() for index in self.indices())
        quantized = quantize_rows(values, crow)
        return type(self)(*quantized, crow, col, self.shape, self.pattern, plans=False)

    def dequantized(self) -> Tensor:
        """The values in float32, `(nnz,)`."""
        return dequantize(self.values, self.scales, self.crow)

    def to_dense(self) -> Tensor:
        """The dense float32 weight of what is stored now; the quantization error stays."""
        return self._dense(self.dequantized())

    def prepare_training(self):
        """Refused: int8 values take no optimizer steps."""
        raise RuntimeError(
            "Int8CSRWeight: expected inference, got a request to train; train first, quantize then"
        )

    def linear(self, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """act(x W^T + b) for x `(..., in)` float32 or bfloat16; bias `(out,)`."""
        if self.training:
            raise RuntimeError(
                "Int8CSRWeight: expected a model in eval mode, got one in training mode; "
                "call model.eval()"
            )
        b = self._buffers
        index = (b["values"], b["scales"], b["crow"], b["col"])
        return csr_linear_int8(x, *index, bias, b["plan"], activation)

    def conv2d(self, *arguments):
        """Refused: this is the weight of a linear layer."""
        raise RuntimeError("Int8CSRWeight: expected a linear layer, got a convolution")

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:  # they are no activations: half would lose bits
            self.scales = scales.to(self.scales.device)
        return self

    def _check(self, parts) -> None:
        check_int8(*parts.values(), self.shape)


def quantize_rows(values: Tensor, crow: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 values `(nnz,)` and scales `(rows,)` of CSR values.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    values = values.float()
    if not bool(values.isfinite().all()):
        raise ValueError("quantize: expected finite weights, got NaN or infinity among them")
    rows = crow.numel() - 1
    row = torch.repeat_interleave(torch.arange(rows, device=values.device), crow.diff().long())
    largest = values.new_zeros(rows).scatter_reduce(0, row, values.abs(), "amax")
    # A row of zeros, or of numbers too small to be divided by 127, has no scale of its own.
    scales = (largest / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales[row]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales
