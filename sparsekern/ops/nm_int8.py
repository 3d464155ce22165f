"""nm_linear_int8: y = act(x (s W)^T + b), 8-bit W with n of every m, a float32 scale s per output.

Shapes: x (..., in) floating point, values (out, slots) int8, or uint8 that holds the bits of float8
e4m3, scales (out,) float32, index, n, m and plan as in nm_linear; bias (out,). The weight is
frozen: gradients go to x and bias only.

Without `dynamic` weight-only: products and sums are float32 (on a GPU operands of the dtype of x).
With it each token of x is rounded as well, to the same 8 bits, with a scale of its own: the largest
absolute value of the token / 127 (448 in float8), so that tensor cores multiply 8-bit numbers
(Dettmers et al. 2022, "LLM.int8()", section 2.1, row-wise absmax on both sides). Every device
rounds alike; gradients pass as if nothing had been rounded (straight-through). A NaN or infinity
makes its whole token NaN or infinite.
"""

import torch

from ._frozen import register_frozen
from ._library import define
from .nm import nm_linear, nm_linear_grad_input

OP = "nm_linear_int8"
FLOAT8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}  # by the dtype of the values


def to_bytes(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Float32 numbers, at most `LARGEST` in size, rounded to int8, or to float8 as uint8.

    Never -0.0: the compressor of cuSPARSELt takes it for a weight that is kept.
    """
    if kind == torch.int8:
        return x.round().clamp(-LARGEST[kind], LARGEST[kind]).to(torch.int8)
    bits = x.clamp(-LARGEST[kind], LARGEST[kind]).to(FLOAT8).view(torch.uint8)
    return torch.where(bits == 128, 0, bits)


def from_bytes(values: torch.Tensor) -> torch.Tensor:
    """The float32 numbers that int8 or the bits of float8 stand for."""
    return (values.view(FLOAT8) if values.dtype == torch.uint8 else values).float()


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values `(out, slots)`: each of them times the scale of its row."""
    return from_bytes(values) * scales[:, None]


def quantize_tokens(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens `(..., in)` as 8 bits of `kind`, and the float32 scale of each, `(..., 1)`."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    scales = (largest / LARGEST[kind]).clamp_min(torch.finfo(torch.float32).tiny)
    return to_bytes(x / scales, kind), scales


def rounded_tokens(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """The float32 tokens that a dynamic product sees."""
    rounded, scales = quantize_tokens(x, kind)
    return from_bytes(rounded) * scales


def _reference(x, values, scales, index, bias, plan, n, m, dynamic=False, activation="none"):
    seen = rounded_tokens(x, values.dtype) if dynamic else x.float()
    bias = None if bias is None else bias.float()
    wide = dequantize_rows(values, scales)
    return nm_linear(seen, wide, index, bias, plan, None, n, m, activation).to(x.dtype)


def _fake(x, values, scales, index, bias, plan, n, m, dynamic=False, activation="none"):
    return x.new_empty((*x.shape[:-1], index.shape[0]))


nm_linear_int8 = define(
    "nm_linear_int8(Tensor x, Tensor values, Tensor scales, Tensor index, Tensor? bias, "
    'Tensor? plan, int n, int m, bool dynamic=False, str activation="none") -> Tensor',
    _reference,
    _fake,
)


def _grad_input(grad, weight, in_features, sizes):
    values, scales, index = weight
    wide = dequantize_rows(values, scales).to(grad.dtype)
    return nm_linear_grad_input(grad, wide, index, None, in_features, *sizes[:2])


call_nm_linear_int8 = register_frozen(nm_linear_int8, _grad_input, indices=1)
