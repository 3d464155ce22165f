"""Least squares over the weights that a mask leaves."""

import torch
from torch import Tensor

from .targets import Layer


def by_groups(layer: Layer) -> Tensor:
    """Weight of a layer as `(groups, out / groups, fan_in)`, at least float32."""
    weight = layer.weight
    rows = weight.reshape(layer.groups, -1, weight[0].numel())
    return rows if rows.dtype == torch.float64 else rows.float()


def least_squares(
    weight: Tensor,
    mask: Tensor,
    dense: Tensor,
    gram: Tensor,
    cross: Tensor,
    ridge: float,
    iterations: int,
) -> Tensor:
    """Least-squares weights under a mask, by preconditioned conjugate gradients, rows at once.

    Minimises `||X W^T - Y||^2 + lambda ||W - dense||^2` over the weights where the mask holds, with
    `lambda = ridge * mean(diag(gram))` and the diagonal as preconditioner. Any leading dimensions.

    Args:
        weight: `(..., out, in)`, the start, 0 outside the mask.
        mask: Boolean `(..., out, in)`, True = may be nonzero.
        dense: `(..., out, in)`.
        gram: `(..., in, in)`, `X^T X`.
        cross: `(..., out, in)`, `Y^T X`.
        ridge: Relative strength of the pull towards `dense`.
        iterations: Number of iterations.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    strength = ridge * diagonal.mean(-1)[..., None, None]
    # An input that is never active moves nothing; any positive scale keeps 0 / 0 out.
    scale = diagonal[..., None, :] + strength
    scale = torch.where(scale > 0, scale, 1)
    left = (cross + strength * dense - weight @ gram - strength * weight).where(mask, 0)
    ahead = left / scale
    step, slope = ahead, (left * ahead).sum(-1, keepdim=True)
    tiny = torch.finfo(weight.dtype).tiny
    for _ in range(iterations):
        moved = (step @ gram + strength * step).where(mask, 0)
        length = slope / (step * moved).sum(-1, keepdim=True).clamp_min(tiny)
        weight, left = weight + length * step, left - length * moved
        ahead = left / scale
        slope, before = (left * ahead).sum(-1, keepdim=True), slope
        step = ahead + slope / before.clamp_min(tiny) * step
    return weight
