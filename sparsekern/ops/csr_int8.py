"""csr_linear_int8: y = act(x (s W)^T + b) with int8 W in CSR and a float32 scale s per output row.

Shapes: x (..., in) float32 or bfloat16, values (nnz,) int8, scales (out,) float32, crow, col, bias
and plan as in csr_linear. Weight-only: products and sums are float32 (Dettmers et al. 2022,
"LLM.int8()", section 2.1, row-wise absmax). The weight is frozen: gradients go to x and bias only.
"""

import torch

from ._frozen import register_frozen
from ._library import activate, csr_to_dense, define, row_of_each
from .csr import csr_linear_grad_input

OP = "csr_linear_int8"


def dequantize(values, scales, crow):
    """The float32 values `(nnz,)`: each int8 times the scale of its row."""
    return values.float() * scales[row_of_each(crow)]


def _reference(x, values, scales, crow, col, bias=None, plan=None, activation="none"):
    weight = csr_to_dense(OP, dequantize(values, scales, crow), crow, col, x.shape[-1])
    bias = None if bias is None else bias.float()
    y = torch.nn.functional.linear(x.float(), weight, bias)
    return activate(y, activation, OP).to(x.dtype).contiguous()


def _fake(x, values, scales, crow, col, bias=None, plan=None, activation="none"):
    return x.new_empty((*x.shape[:-1], crow.shape[0] - 1))


csr_linear_int8 = define(
    "csr_linear_int8(Tensor x, Tensor values, Tensor scales, Tensor crow, Tensor col, "
    'Tensor? bias=None, Tensor? plan=None, str activation="none") -> Tensor',
    _reference,
    _fake,
)


def _grad_input(grad, weight, in_features, sizes):
    values, scales, crow, col = weight
    wide = dequantize(values, scales, crow).to(grad.dtype)
    return csr_linear_grad_input(grad, wide, crow, col, None, in_features)


call_csr_linear_int8 = register_frozen(csr_linear_int8, _grad_input)
