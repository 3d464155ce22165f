"""How an op gets its derivatives: backward, forward mode, and both under torch.func.

`torch.library.register_autograd` would do for plain gradients. It refuses the transforms of
torch.func (grad, jacrev, per-sample gradients), drops the tangents of forward mode without a word,
and costs a backward pass that nobody differentiates a few us per op.

A kernel in Python at the autograd key, this one like torch's, costs a call without gradients 4 us
and one with them 20 us: more than a small layer. So `register` hands back the op as a function that
decides the same without the dispatcher. Layers call that one.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad

from ._library import LIBRARY

_BELOW = torch._C._after_autograd_keyset


def register(
    op, setup_context: Callable, backward: Callable, jvp: Callable | None = None
) -> Callable:
    """Give an op its derivatives.

    Args:
        op: The op; its results are one tensor or several.
        setup_context: `(ctx, inputs, output)`; inputs are all arguments, defaults filled in.
        backward: `(ctx, saved, *grads)` to a tuple, one gradient or None per argument; `saved` is
            what `setup_context` saved for it. What it calls must be differentiable itself, for
            derivatives of higher order.
        jvp: `(inputs, tangents)` to the tangent of the result; both one per argument, tangents None
            where there is none. Without it, forward mode is an error that names the op.

    Returns:
        The op, as a function of all its arguments in order, at the least host time.
    """
    defaults = tuple(argument.default_value for argument in op._schema.arguments)
    apply = _function(op, setup_context, backward, jvp)

    def kernel(keyset, *args):
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not (recorded or _in_forward_ad()):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & _BELOW, *args)
        args += defaults[len(args) :]  # the dispatcher leaves out what equals its default
        if torch._C._are_functorch_transforms_active():
            # The dispatcher has come down to one transform already; this is its autograd.
            with enable_single_level_autograd_function():
                return apply(*args, keyset)
        return apply(*unwrap_dead_wrappers(args), keyset)

    LIBRARY.impl(_name(op), kernel, "Autograd", with_keyset=True)
    return _direct(op, setup_context, backward)


def _direct(op, setup_context: Callable, backward: Callable) -> Callable:
    """The op without the way through the autograd key, where nothing unusual is going on."""
    run, below = op._op, torch._C._AutoDispatchBelowAutograd

    def forward(ctx, *args):
        with below():
            result = run(*args)
        setup_context(ctx, args, result)
        return result

    apply = _apply_of(op, forward, lambda ctx, *grads: _run_backward(ctx, backward, grads))
    any_requires_grad, is_tracing = torch._C._any_requires_grad, torch._C._is_tracing
    transformed = torch._C._are_functorch_transforms_active

    def call(*args):
        if torch.compiler.is_compiling() or is_tracing() or transformed() or _in_forward_ad():
            return op(*args)
        if torch.is_inference_mode_enabled():
            return run(*args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return apply(*args)
        with below():
            return run(*args)

    return call


def refuse(op, instead: str) -> None:
    """Make every derivative of an op an error, not a zero.

    Args:
        op: The op.
        instead: What to use instead, ends the message.
    """

    def backward(ctx, saved, *grads):
        raise RuntimeError(
            f"{_name(op)}: expected results that are not differentiated, got a gradient for them; "
            f"{instead}"
        )

    register(op, lambda ctx, inputs, output: None, backward)


def in_transform() -> bool:
    """Whether a transform of torch.func or forward mode is at work; never while compiling."""
    if torch.compiler.is_compiling():
        return False
    return _has_tangents()


def _name(op) -> str:
    return op._schema.name.split("::")[1]


def _in_forward_ad() -> bool:
    return _has_tangents() and torch._C._is_fwd_grad_enabled()


def _has_tangents() -> bool:
    """Whether tensors may have tangents; a compiler leaves the level in Python as it was."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _function(op, setup_context, backward, jvp):
    """What records a call of the op that came through the dispatcher, its keyset last."""

    def forward(ctx, *args):
        *args, keyset = args
        result = _lower(op, keyset, args)
        setup_context(ctx, args, result)
        if _has_tangents():
            ctx.constants = [None if isinstance(a, Tensor) else a for a in args]
            ctx.save_for_forward(*(a if isinstance(a, Tensor) else None for a in args))
        return result

    def run_backward(ctx, *grads):
        return *_run_backward(ctx, backward, grads), None

    def run_jvp(ctx, *tangents):
        if jvp is None:
            raise RuntimeError(
                f"{_name(op)}: expected gradients by backward (torch.func.grad, vjp, jacrev), got "
                "a tangent of forward mode (jvp, jacfwd)"
            )
        pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
        inputs = [constant if saved is None else saved for saved, constant in pairs]
        return jvp(inputs, tangents[:-1])

    return _apply_of(op, forward, run_backward, jvp=run_jvp)


def _run_backward(ctx, backward: Callable, grads):
    saved = ctx.saved_tensors  # what checkpoints compute again here has to be recorded
    if torch.is_grad_enabled() or _in_forward_ad():
        return tuple(backward(ctx, saved, *grads))
    with torch._C._AutoDispatchBelowAutograd():  # nothing is recorded: the shortest way
        return tuple(backward(ctx, saved, *grads))


def _apply_of(op, forward: Callable, backward: Callable, **more: Callable) -> Callable:
    """The `apply` of an autograd.Function with these methods."""
    methods = {"forward": forward, "backward": backward, **more}
    methods = {name: staticmethod(method) for name, method in methods.items()}
    function = type(_name(op), (torch.autograd.Function,), methods)
    # Not that of Function, which takes a transform for a reason to start at the top again.
    return super(torch.autograd.Function, function).apply


def _lower(op, keyset, args):
    """The op below autograd; a transform further out goes on recording."""
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _BELOW, *args)
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return op.redispatch(keyset & _BELOW, *args)
