"""batch_norm: batch normalisation in training mode with the activation behind it, and its gradient.

Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1: y = act((x - mean) / sqrt(var + eps) *
weight + bias), mean and biased variance of each channel over images and pixels. Shapes: x (n, c, h,
w), weight and bias (c,); the results are y, contiguous (n, c, h, w), mean and var (c,). float32 and
float64; the activation is none, relu or relu6.
"""

import torch

from . import batching, derivatives
from ._library import FROM_OUTPUT, activate, define

NORM, NORM_GRAD = "batch_norm", "batch_norm_grad"


def _check(op, x, activation):
    if activation not in ("none", *FROM_OUTPUT):
        raise RuntimeError(
            f"{op}: expected activation to be none, relu or relu6, got '{activation}'"
        )
    torch._check(x.dim() == 4, lambda: f"{op}: expected x with 4 dimensions, got {x.dim()}")


def _column(values):
    return values[:, None, None]


def _normalised(x, mean, var, eps):
    return (x - _column(mean)) * _column((var + eps).rsqrt())


def _norm_reference(x, weight, bias, eps, activation="none"):
    _check(NORM, x, activation)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    y = _normalised(x, mean, var, eps) * _column(weight) + _column(bias)
    return activate(y, activation, NORM).contiguous(), mean, var


def _norm_fake(x, weight, bias, eps, activation="none"):
    _check(NORM, x, activation)
    channels = (x.shape[1],)
    return x.new_empty(x.shape), x.new_empty(channels), x.new_empty(channels)


batch_norm = define(
    'batch_norm(Tensor x, Tensor weight, Tensor bias, float eps, str activation="none") -> '
    "(Tensor, Tensor, Tensor)",
    _norm_reference,
    _norm_fake,
)


def _gated(grad, y, activation):
    """Gradient before the activation; NaN lets it through.

    So does torch's relu, while its relu6 does by the place in memory: no hardtanh_backward here.
    """
    if activation == "none":
        return grad
    shut = (y <= 0) | (y >= 6) if activation == "relu6" else y <= 0
    return grad.masked_fill(shut, 0)


def _grad_reference(grad, x, mean, var, weight, bias, eps, activation="none"):
    _check(NORM_GRAD, x, activation)
    normalised = _normalised(x, mean, var, eps)
    y = normalised * _column(weight) + _column(bias)
    grad = _gated(grad, y, activation)
    over = (0, 2, 3)
    along = normalised * _column((grad * normalised).mean(over))
    scale = _column(weight * (var + eps).rsqrt())
    grad_x = scale * (grad - _column(grad.mean(over)) - along)
    return grad_x.contiguous(), (grad * normalised).sum(over), grad.sum(over)


batch_norm_grad = define(
    "batch_norm_grad(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, "
    'float eps, str activation="none") -> (Tensor, Tensor, Tensor)',
    _grad_reference,
    lambda grad, x, mean, var, weight, bias, eps, activation="none": (
        x.new_empty(x.shape),
        mean.new_empty(mean.shape),
        mean.new_empty(mean.shape),
    ),
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, ctx.activation = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, mean, var, weight, bias)


def _backward(ctx, saved, grad, *_):
    x, *sums, weight, bias = saved
    if torch.is_grad_enabled():  # for derivatives of higher order: all of it by ops of torch
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        grads = _grad_reference(grad, x, mean, var, weight, bias, ctx.eps, ctx.activation)
    else:
        grads = batch_norm_grad(grad, x, *sums, weight, bias, ctx.eps, ctx.activation)
    return *grads, None, None


call_batch_norm = derivatives.register(batch_norm, _setup_context, _backward)
derivatives.refuse(batch_norm_grad, "the gradient of batch_norm is differentiable")
batching.register(batch_norm, folds=False)
batching.register(batch_norm_grad, folds=False)
