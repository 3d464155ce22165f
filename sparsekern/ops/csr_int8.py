"""csr_linear_int8: y = act(x (s W)^T + b) with int8 W in CSR and a float32 scale s per output row.

Shapes: x (..., in) float32 or bfloat16, values (nnz,) int8, scales (out,) float32, crow, col, bias
and plan as in csr_linear. Weight-only: products and sums are float32 (Dettmers et al. 2022,
"LLM.int8()", section 2.1, row-wise absmax). The weight is frozen: gradients go to x and bias only.
"""

import torch

from ._library import FROM_OUTPUT, activate, activation_backward, csr_to_dense, define
from .csr import csr_linear_grad_input

OP = "csr_linear_int8"


def dequantize(values, scales, crow):
    """The float32 values `(nnz,)`: each int8 times the scale of its row."""
    return values.float() * torch.repeat_interleave(scales.float(), crow.diff())


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


def _setup_context(ctx, inputs, output):
    x, values, scales, crow, col, bias, plan, ctx.activation = inputs
    ctx.in_features = x.shape[-1]
    recompute = ctx.activation.startswith("gelu")  # its gradient needs the sum before it
    ctx.save_for_backward(
        x if recompute else None,
        values,
        scales,
        crow,
        col,
        bias if recompute else None,
        plan,
        output if ctx.activation in FROM_OUTPUT else None,
    )


def _backward(ctx, grad):
    x, values, scales, crow, col, bias, plan, output = ctx.saved_tensors

    def pre_activation():
        return csr_linear_int8(x, values, scales, crow, col, bias, plan, "none")

    grad = activation_backward(grad, ctx.activation, output, pre_activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        wide = dequantize(values, scales, crow).to(grad.dtype)
        grad_x = csr_linear_grad_input(grad, wide, crow, col, None, ctx.in_features)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None


torch.library.register_autograd(f"sparsekern::{OP}", _backward, setup_context=_setup_context)
