"""The gradients of the products of all formats, written once.

A format has three ops: the product y = act(x W^T + b + residual), the gradient of x, which is
linear in grad and values, and the gradient of values, linear in grad and x. The derivatives of each
of them are the other two, so there are gradients of any order. Their arguments go together so:

    product(x, values, *index, bias, plan, plan_t, *outputs, *sizes, activation, *residual)
    grad_input(grad, values, *index, plan_t, *input_size, *sizes)
    grad_values(grad, x, *index, plan or plan_t, *block, *sizes)

`outputs` and `block` belong to formats of blocks, `residual` to kernels that add it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import batching, derivatives, flops
from ._library import FROM_OUTPUT, activation_backward


@dataclass(frozen=True)
class Format:
    """The ops of a format.

    Attributes:
        product, grad_input, grad_values: The ops.
        indices: How many index tensors there are.
        conv: Whether they are convolutions.
        blocks: Whether the product is told its outputs, and `grad_values` the sizes of a block.
        values_plan: Which plan `grad_values` takes: `plan`, `plan_t`, or `either` of them.
        residual: Whether the product takes one.
    """

    product: torch._ops.OpOverload
    grad_input: torch._ops.OpOverload
    grad_values: torch._ops.OpOverload
    indices: int = 2
    conv: bool = False
    blocks: bool = False
    values_plan: str = "plan_t"
    residual: bool = False

    def outputs(self, grad: Tensor) -> tuple[int, ...]:
        """What the product is told of its result, which is like `grad`."""
        return (grad.shape[1 if self.conv else -1],) if self.blocks else ()

    def input_size(self, x: Tensor) -> tuple[int, ...]:
        """What `grad_input` is told of x."""
        return x.shape[1:] if self.conv else x.shape[-1:]

    def block(self, values: Tensor) -> tuple[int, ...]:
        """What `grad_values` is told of the values."""
        return values.shape[1:] if self.blocks else ()

    def plan_of_values(self, plan, plan_t):
        """The schedule for `grad_values`."""
        if self.values_plan == "either":
            return plan if plan_t is None or plan_t.numel() == 0 else plan_t
        return plan_t if self.values_plan == "plan_t" else plan


def register_format(f: Format) -> Callable:
    """Register the derivatives of the three ops of a format, their batches and their flops.

    Returns:
        The product, as `derivatives.register` hands it back.
    """
    backward, jvp = _product_backward(f), _product_jvp(f)
    call = derivatives.register(f.product, _product_context(f), backward, jvp)
    for op, rule in ((f.grad_input, _grad_input_rule), (f.grad_values, _grad_values_rule)):
        derivatives.register(op, *rule(f), _bilinear_jvp(op))
    for op in (f.product, f.grad_input, f.grad_values):
        batching.register(op, conv=f.conv, folds=op is not f.grad_values)
        flops.register(op)
    return call


def _product_context(f: Format):
    """What saves for the gradients of a product what they will ask for, and nothing else."""
    end = 5 + f.indices  # of the parts: x, values, the index, bias, plan, plan_t

    def setup_context(ctx, inputs, output):
        x, values, *index, bias, plan, plan_t = inputs[:end]
        *ctx.told, ctx.activation, residual = inputs[end:] if f.residual else (*inputs[end:], None)
        ctx.input_size, ctx.block = f.input_size(x), f.block(values)
        needs_x, needs_values = ctx.needs_input_grad[:2]
        recompute = ctx.activation.startswith("gelu")  # its gradient needs the sum before it
        ctx.save_for_backward(
            x if needs_values or recompute else None,
            values if needs_x or recompute else None,
            *index,
            bias if recompute else None,
            plan,
            plan_t,
            output if ctx.activation in FROM_OUTPUT else None,
            residual if recompute else None,
        )

    return setup_context


def _product_backward(f: Format):
    bias_at, count = 2 + f.indices, len(f.product._schema.arguments)

    def backward(ctx, saved, grad):
        x, values, *index, bias, plan, plan_t, output, residual = saved
        added = (residual,) if f.residual else ()

        def pre_activation():
            return f.product(x, values, *index, bias, plan, plan_t, *ctx.told, "none", *added)

        grad = activation_backward(grad, ctx.activation, output, pre_activation)
        needs, sizes = ctx.needs_input_grad, ctx.told[1:] if f.blocks else ctx.told
        grads = [None] * count
        if needs[0]:
            grads[0] = f.grad_input(grad, values, *index, plan_t, *ctx.input_size, *sizes)
        if needs[1]:
            schedule = f.plan_of_values(plan, plan_t)
            grads[1] = f.grad_values(grad, x, *index, schedule, *ctx.block, *sizes)
        if needs[bias_at]:
            flat = grad if f.conv else grad.reshape(-1, grad.shape[-1])
            grads[bias_at] = flat.sum((0, 2, 3) if f.conv else 0)
        if f.residual and needs[count - 1]:
            grads[count - 1] = grad
        return grads

    return backward


def _grad_input_rule(f: Format):
    """How the gradient of x differentiates: what saves for it, and the backward function."""
    plan_at, sizes_at = 2 + f.indices, 3 + f.indices + (3 if f.conv else 1)

    def setup_context(ctx, inputs, output):
        grad, values, *index = inputs[:plan_at]
        ctx.told, ctx.block, ctx.sizes = f.outputs(grad), f.block(values), inputs[sizes_at:]
        needs_grad, needs_values = ctx.needs_input_grad[:2]
        saved = grad if needs_values else None, values if needs_grad else None
        ctx.save_for_backward(*saved, *index, inputs[plan_at])

    def backward(ctx, saved, change):
        grad, values, *index, plan_t = saved
        grads = [None] * (sizes_at + len(ctx.sizes))
        if ctx.needs_input_grad[0]:
            plans = (None, None, plan_t)  # no bias
            grads[0] = f.product(change, values, *index, *plans, *ctx.told, *ctx.sizes)
        if ctx.needs_input_grad[1]:
            schedule = f.plan_of_values(None, plan_t)
            grads[1] = f.grad_values(grad, change, *index, schedule, *ctx.block, *ctx.sizes)
        return grads

    return setup_context, backward


def _grad_values_rule(f: Format):
    """The same for the gradient of values."""
    plan_at, sizes_at = 2 + f.indices, 3 + f.indices + (2 if f.blocks else 0)

    def setup_context(ctx, inputs, output):
        grad, x, *index = inputs[:plan_at]
        ctx.told, ctx.input_size, ctx.sizes = f.outputs(grad), f.input_size(x), inputs[sizes_at:]
        needs_grad, needs_x = ctx.needs_input_grad[:2]
        saved = grad if needs_x else None, x if needs_grad else None
        ctx.save_for_backward(*saved, *index, inputs[plan_at])

    def backward(ctx, saved, change):
        grad, x, *index, schedule = saved
        plan = schedule if f.values_plan == "plan" else None
        plan_t = schedule if f.values_plan == "plan_t" else None
        grads = [None] * (sizes_at + len(ctx.sizes))
        if ctx.needs_input_grad[0]:
            plans = (None, plan, plan_t)  # no bias
            grads[0] = f.product(x, change, *index, *plans, *ctx.told, *ctx.sizes)
        if ctx.needs_input_grad[1]:
            grads[1] = f.grad_input(grad, change, *index, plan_t, *ctx.input_size, *ctx.sizes)
        return grads

    return setup_context, backward


def _bilinear_jvp(op):
    """The tangent of an op that is linear in each of its first two arguments."""

    def jvp(inputs, tangents):
        return sum(_bilinear_terms(op, inputs, tangents))

    return jvp


def _bilinear_terms(op, inputs, tangents) -> list[Tensor]:
    first, second, *rest = inputs
    terms = [] if tangents[0] is None else [op(tangents[0], second, *rest)]
    return terms if tangents[1] is None else [*terms, op(first, tangents[1], *rest)]


def _product_jvp(f: Format):
    bias_at = 2 + f.indices
    residual_at = len(f.product._schema.arguments) - 1 if f.residual else None
    activation_at = len(f.product._schema.arguments) - 1 - f.residual

    def jvp(inputs, tangents):
        before = list(inputs)
        before[activation_at] = "none"
        pre_activation = f.product(*before)
        linear = list(before)
        linear[bias_at] = None
        if f.residual:
            linear[residual_at] = None
        tangent = sum(
            _bilinear_terms(f.product, linear, tangents), torch.zeros_like(pre_activation)
        )
        if tangents[bias_at] is not None:
            bias = tangents[bias_at]
            tangent = tangent + (bias[:, None, None] if f.conv else bias)
        if f.residual and tangents[residual_at] is not None:
            tangent = tangent + tangents[residual_at]
        # The derivative of an activation is a factor per value, whichever way it is taken.
        return activation_backward(
            tangent, inputs[activation_at], pre_activation, lambda: pre_activation
        )

    return jvp
