"""block_linear_int8: y = act(x (s W)^T + b), int8 W in dense blocks, a float32 scale s per output.

Shapes: x (..., in) float32 or bfloat16, values (n_blocks, R, C) int8, scales (out,) float32, crow,
col, bias and plan as in block_linear. Weight-only, as csr_linear_int8: products and sums are
float32, the scale is applied to the sum. The weight is frozen: gradients go to x and bias only.
"""

import torch

from ._frozen import register_frozen
from ._library import activate, define, row_of_each
from .block import block_linear_grad_input, blocks_to_dense

OP = "block_linear_int8"


def scales_of_blocks(scales, crow, block_rows: int):
    """The scale of each row of each block, `(n_blocks, R)`; 0 beyond the last output."""
    padded = torch.nn.functional.pad(scales, (0, (crow.numel() - 1) * block_rows - len(scales)))
    return padded.view(-1, block_rows)[row_of_each(crow)]


def dequantize_blocks(values, scales, crow):
    """The float32 values `(n_blocks, R, C)`: each int8 times the scale of its row."""
    return values.float() * scales_of_blocks(scales, crow, values.shape[1])[:, :, None]


def _reference(x, values, scales, crow, col, bias, plan, out_features, activation="none"):
    wide = dequantize_blocks(values, scales, crow)
    weight = blocks_to_dense(OP, wide, crow, col, out_features, x.shape[-1]).squeeze(2)
    bias = None if bias is None else bias.float()
    y = torch.nn.functional.linear(x.float(), weight, bias)
    return activate(y, activation, OP).to(x.dtype).contiguous()


def _fake(x, values, scales, crow, col, bias, plan, out_features, activation="none"):
    return x.new_empty((*x.shape[:-1], out_features))


block_linear_int8 = define(
    "block_linear_int8(Tensor x, Tensor values, Tensor scales, Tensor crow, Tensor col, "
    'Tensor? bias, Tensor? plan, SymInt out_features, str activation="none") -> Tensor',
    _reference,
    _fake,
)


def grad_input(grad, weight, in_features, sizes):
    """Gradient of x `(..., in)` in the dtype of `grad` `(..., out)`, past the activation."""
    values, scales, crow, col = weight
    wide = dequantize_blocks(values, scales, crow).to(grad.dtype)
    return block_linear_grad_input(grad, wide, crow, col, None, in_features)


call_block_linear_int8 = register_frozen(block_linear_int8, grad_input)
