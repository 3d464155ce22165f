"""Gradients of the ops whose weight is frozen: to x and bias only.

Their arguments are x, values, scales, crow, col, bias, plan, the sizes of the format, activation.
"""

from ._library import FROM_OUTPUT, activation_backward


def setup_context(ctx, inputs, output):
    """Save what the gradients will ask for and nothing else."""
    x, values, scales, crow, col, bias, plan, *ctx.sizes, ctx.activation = inputs
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


def backward(forward, grad_input):
    """The backward function of an op.

    Args:
        forward: The op.
        grad_input: `(grad, values, scales, crow, col, in_features)` to the gradient of x.
    """

    def gradients(ctx, grad):
        x, values, scales, crow, col, bias, plan, output = ctx.saved_tensors

        def pre_activation():
            return forward(x, values, scales, crow, col, bias, plan, *ctx.sizes, "none")

        grad = activation_backward(grad, ctx.activation, output, pre_activation)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_input(grad, values, scales, crow, col, ctx.in_features)
        if ctx.needs_input_grad[5]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, None, None, None, grad_bias, None, *[None] * len(ctx.sizes), None

    return gradients
