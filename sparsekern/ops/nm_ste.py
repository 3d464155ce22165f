"""nm_ste_linear: y = x P(W)^T + b, P keeping the n largest weights of every m; gradients reach all.

Shapes: x (..., in), W (out, in), bias (out,), all of one floating dtype; in is a multiple of m, and
out, too, where the mask is `transposable` (n of every m along both, the one with the largest sum of
each m x m tile; Hubara et al. 2021, arXiv:2102.08124). For training on the fly: the mask follows W
at every call. The gradient of W is that by the pruned weight, for kept and dropped ones alike
(straight-through, Zhou et al. 2021, arXiv:2102.04010, eq. 7); the gradient of x is grad P(W). Both
are differentiable in turn, in the same way.

`nm_prune` gives P(W), dense. Of equal weights the first are kept.
"""

import torch

from ..patterns_nm import COMPARED, NM, TransposableNM, largest_members
from . import batching, derivatives, flops
from ._geometry import need
from ._library import define

LINEAR, GRAD_INPUT, PRUNE = "nm_ste_linear", "nm_ste_linear_grad_input", "nm_prune"


def check_weight(op: str, weight, n: int, m: int, transposable: bool) -> None:
    """Refuse a weight that cannot be cut into whole groups."""
    need(op, weight.dim() == 2, "weight with 2 dimensions", f"shape {tuple(weight.shape)}")
    sides = weight.shape if transposable else weight.shape[1:]
    fits = 1 <= n < m and all(side % m == 0 for side in sides)
    which = "sizes" if transposable else "in_features"
    need(
        op,
        fits,
        f"weight with {which} that are multiples of {m}",
        f"{tuple(weight.shape)} for {n}:{m}",
    )


def prune_reference(weight, n, m, transposable):
    """P(W) `(out, in)` by plain torch; no -0.0, which the compressor of cuSPARSELt would keep."""
    check_weight(PRUNE, weight, n, m, transposable)
    if weight.numel() == 0:
        return weight.clone()
    pattern = (TransposableNM if transposable else NM)(n, m)
    if weight.device.type == "cpu" and pattern.verify(weight != 0):
        return weight + 0.0  # as a Pruner leaves it: a look is quicker than the choice
    sizes = weight.abs().float()
    if transposable or m > COMPARED:
        mask = pattern.mask(sizes)
    else:  # without a wait for the device
        groups = sizes.view(weight.shape[0], -1, m, 1)
        mask = largest_members(groups, n).view(weight.shape)
    return torch.where(mask, weight, 0) + 0.0


def _prune_fake(weight, n, m, transposable):
    check_weight(PRUNE, weight, n, m, transposable)
    return weight.new_empty(weight.shape)


nm_prune = define(
    "nm_prune(Tensor weight, int n, int m, bool transposable) -> Tensor",
    prune_reference,
    _prune_fake,
)


def _linear_reference(x, weight, bias, n, m, transposable):
    check_weight(LINEAR, weight, n, m, transposable)
    pruned = prune_reference(weight, n, m, transposable)
    return torch.nn.functional.linear(x, pruned, bias).contiguous()


def _linear_fake(x, weight, bias, n, m, transposable):
    check_weight(LINEAR, weight, n, m, transposable)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


nm_ste_linear = define(
    "nm_ste_linear(Tensor x, Tensor weight, Tensor? bias, int n, int m, bool transposable) "
    "-> Tensor",
    _linear_reference,
    _linear_fake,
)


def _grad_input_reference(grad, weight, n, m, transposable):
    check_weight(GRAD_INPUT, weight, n, m, transposable)
    return (grad @ prune_reference(weight, n, m, transposable)).contiguous()


def _grad_input_fake(grad, weight, n, m, transposable):
    check_weight(GRAD_INPUT, weight, n, m, transposable)
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


nm_ste_linear_grad_input = define(
    "nm_ste_linear_grad_input(Tensor grad, Tensor weight, int n, int m, bool transposable) "
    "-> Tensor",
    _grad_input_reference,
    _grad_input_fake,
)


def _linear_context(ctx, inputs, output):
    x, weight, _, *ctx.pattern = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)


def _linear_backward(ctx, saved, grad):
    x, weight = saved
    needs = ctx.needs_input_grad
    grad_x = grad_weight = grad_bias = None
    flat = grad.reshape(-1, grad.shape[-1])
    if needs[0]:
        grad_x = nm_ste_linear_grad_input(grad, weight, *ctx.pattern)
    if needs[1]:
        grad_weight = flat.t() @ x.reshape(-1, x.shape[-1])
    if needs[2]:
        grad_bias = flat.sum(0)
    return grad_x, grad_weight, grad_bias, None, None, None


def _grad_input_context(ctx, inputs, output):
    grad, weight, *ctx.pattern = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(grad if needs[1] else None, weight if needs[0] else None)


def _grad_input_backward(ctx, saved, change):
    """As that of W + (P(W) - W) with a constant in brackets, which straight-through stands for."""
    grad, weight = saved
    grad_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_grad = nm_ste_linear(change, weight, None, *ctx.pattern)
    if ctx.needs_input_grad[1]:
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = flat.t() @ change.reshape(-1, change.shape[-1])
    return grad_grad, grad_weight, None, None, None


derivatives.refuse(nm_prune, "nm_ste_linear passes them on")
derivatives.register(nm_ste_linear, _linear_context, _linear_backward)
derivatives.register(nm_ste_linear_grad_input, _grad_input_context, _grad_input_backward)
for _op in (nm_ste_linear, nm_ste_linear_grad_input):
    batching.register(_op)
    flops.register(_op)
batching.register(nm_prune, folds=False)
