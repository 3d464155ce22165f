"""block_linear_int8_dynamic: y = act(a (s W) q^T + b), int8 W in dense blocks, int8 activations q.

Shapes: x (..., in) float32 or bfloat16, values (n_blocks, R, C) int8 with C a multiple of 4,
scales s (out,) float32, crow, col, bias and plan as in block_linear_int8. Each token is
quantized inside the op, symmetric: a = max |x| / 127, q = round(x / a), ties to even (Dettmers et
al. 2022, "LLM.int8()", equation 3, vector-wise). The sums of q W are exact integers, so at most
132104 in_features are taken. A token that is not finite gives NaN in all its outputs. The weight is
frozen: gradients go to x and bias only, as if nothing were rounded (the straight-through estimator
of Bengio et al. 2013).
"""

import torch

from ._frozen import register_frozen
from ._library import activate, define
from .block import blocks_to_dense
from .block_int8 import grad_input

OP = "block_linear_int8_dynamic"


def quantize_tokens(x):
    """The int8 activations q, as float32, of x `(..., in)` float32, and their scales `(..., 1)`.

    Scales are NaN, and q is 0, where a token is not finite.
    """
    largest = x.abs().amax(-1, True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scales = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    return (x * (1 / scales)).round().nan_to_num(0.0), scales


def _reference(x, values, scales, crow, col, bias, plan, out_features, activation="none"):
    q, x_scales = quantize_tokens(x.float())
    weight = blocks_to_dense(OP, values.double(), crow, col, out_features, x.shape[-1]).squeeze(2)
    sums = torch.nn.functional.linear(q.double(), weight)  # exact, on devices without int8 products
    y = sums.float() * scales * x_scales
    y = y if bias is None else y + bias.float()
    return activate(y, activation, OP).to(x.dtype).contiguous()


def _fake(x, values, scales, crow, col, bias, plan, out_features, activation="none"):
    return x.new_empty((*x.shape[:-1], out_features))


block_linear_int8_dynamic = define(
    "block_linear_int8_dynamic(Tensor x, Tensor values, Tensor scales, Tensor crow, Tensor col, "
    'Tensor? bias, Tensor? plan, SymInt out_features, str activation="none") -> Tensor',
    _reference,
    _fake,
)
call_block_linear_int8_dynamic = register_frozen(block_linear_int8_dynamic, grad_input)
