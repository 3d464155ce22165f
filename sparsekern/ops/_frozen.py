"""Gradients of the ops whose weight is frozen: to x and bias only, of any order.

Their arguments are x, values, scales, the index tensors of the format, bias, plan, the sizes of the
format, activation.
"""

from collections.abc import Callable

from . import batching, derivatives, flops
from ._library import FROM_OUTPUT, activation_backward


def register_frozen(forward, grad_input, indices: int = 2) -> Callable:
    """Register the gradients of an op, its batches and its flops.

    Args:
        forward: The op.
        grad_input: `(grad, (values, scales, *index), in_features, sizes)` to the gradient of x, by
            ops that are differentiable.
        indices: Index tensors of the format.

    Returns:
        The op, as `derivatives.register` hands it back.
    """
    backward = _backward(forward, grad_input, indices)
    call = derivatives.register(forward, _setup_context(indices), backward)
    batching.register(forward)
    flops.register(forward)
    return call


def _setup_context(indices: int):
    """What saves for the gradients of an op with this many index tensors, and nothing else."""

    def save(ctx, inputs, output):
        x, *weight = inputs[: 3 + indices]
        bias, plan, *ctx.sizes, ctx.activation = inputs[3 + indices :]
        ctx.in_features = x.shape[-1]
        recompute = ctx.activation.startswith("gelu")  # its gradient needs the sum before it
        ctx.save_for_backward(
            x if recompute else None,
            *weight,
            bias if recompute else None,
            plan,
            output if ctx.activation in FROM_OUTPUT else None,
        )

    return save


def _backward(forward, grad_input, indices: int):
    def gradients(ctx, saved, grad):
        x, *weight, bias, plan, output = saved

        def pre_activation():
            return forward(x, *weight, bias, plan, *ctx.sizes, "none")

        grad = activation_backward(grad, ctx.activation, output, pre_activation)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_input(grad, weight, ctx.in_features, ctx.sizes)
        if ctx.needs_input_grad[3 + indices]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, *[None] * (2 + indices), grad_bias, *[None] * (2 + len(ctx.sizes))

    return gradients
