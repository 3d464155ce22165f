"""csr_linear: y = act(x W^T + b) with W in CSR, and its two gradients.

Shapes: x (..., in), values (nnz,), crow (out + 1,) int32, col (nnz,) int32 sorted inside each row,
bias (out,). `plan` (forward) and `plan_t` (both gradients) are kernel schedules made by csr_plan;
without them the op makes its own on each call, which also validates the indices. A plan vouches for
the indices it was made of.

A plan made with `pairs` also serves bfloat16 products of two columns at a time, on CPUs that have
them (AVX512_BF16): sums in float32, rounded once. There an infinite or NaN input also reaches the
rows that store only its neighbour in the pair (0 * inf, as in a dense layer), and subnormal numbers
count as zero. Without it, and for one or two tokens, bfloat16 is computed in float32.
"""

import torch

from ._library import (
    activate,
    check_indices,
    csr_to_dense,
    define,
    row_of_each,
)
from .gradients import Format, register_format

LINEAR = "csr_linear"


def _linear_reference(x, values, crow, col, bias=None, plan=None, plan_t=None, activation="none"):
    weight = csr_to_dense(LINEAR, values, crow, col, x.shape[-1])
    return activate(torch.nn.functional.linear(x, weight, bias), activation, LINEAR).contiguous()


def _linear_fake(x, values, crow, col, bias=None, plan=None, plan_t=None, activation="none"):
    return x.new_empty((*x.shape[:-1], crow.shape[0] - 1))


csr_linear = define(
    "csr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias=None, "
    'Tensor? plan=None, Tensor? plan_t=None, str activation="none") -> Tensor',
    _linear_reference,
    _linear_fake,
)


def _grad_input_reference(grad, values, crow, col, plan_t, in_features):
    weight = csr_to_dense("csr_linear_grad_input", values, crow, col, in_features)
    return (grad @ weight).contiguous()


csr_linear_grad_input = define(
    "csr_linear_grad_input(Tensor grad, Tensor values, Tensor crow, Tensor col, Tensor? plan_t, "
    "SymInt in_features) -> Tensor",
    _grad_input_reference,
    lambda grad, values, crow, col, plan_t, in_features: grad.new_empty(
        (*grad.shape[:-1], in_features)
    ),
)


def _grad_values_reference(grad, x, crow, col, plan_t):
    check_indices("csr_linear_grad_values", crow, col, x.shape[-1])
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dense[row_of_each(crow), col.long()]


csr_linear_grad_values = define(
    "csr_linear_grad_values(Tensor grad, Tensor x, Tensor crow, Tensor col, Tensor? plan_t) "
    "-> Tensor",
    _grad_values_reference,
    lambda grad, x, crow, col, plan_t: x.new_empty((col.shape[0],)),
)


call_csr_linear = register_format(
    Format(csr_linear, csr_linear_grad_input, csr_linear_grad_values, values_plan="either")
)


def _plan_reference(crow, col, cols, groups=1, taps=1, transpose=False, pairs=False):
    check_indices("csr_plan", crow, col, cols)
    return crow.new_empty((0,))  # the reference implementations need no schedule


def _plan_fake(crow, col, cols, groups=1, taps=1, transpose=False, pairs=False):
    return crow.new_empty((torch.library.get_ctx().new_dynamic_size(),))


csr_plan = define(
    "csr_plan(Tensor crow, Tensor col, int cols, int groups=1, int taps=1, bool transpose=False, "
    "bool pairs=False) -> Tensor",
    _plan_reference,
    _plan_fake,
)
