"""Derivatives of higher order, forward mode and batches of every op on every sample."""

import pytest
import torch
from ops_common import OPS, Calls, small, with_grads
from samples import SAMPLES


def differentiable(name, sample):
    """The op as a function of the arguments that take gradients, and these arguments."""
    arguments = with_grads(sample.build(torch.float64), sample.grads)

    def function(*inputs):
        filled = list(arguments)
        for place, value in zip(sample.grads, inputs, strict=True):
            filled[place] = value
        return OPS[name](*filled)

    return function, tuple(arguments[i] for i in sample.grads)


@pytest.mark.parametrize(("name", "sample"), small)
def test_gradgradcheck(name, sample):
    function, inputs = differentiable(name, sample)
    if inputs[0].numel():
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("name", "sample"), small)
def test_forward_mode_and_batches(name, sample):
    function, inputs = differentiable(name, sample)
    if inputs[0].numel():
        assert torch.autograd.gradcheck(
            function, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True,
        )  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_gradients_that_differentiate(name):
    sample = SAMPLES[name][1]
    arguments = with_grads(sample.build(torch.float32), sample.grads)
    y = OPS[name](*arguments)
    with Calls() as calls:
        y.sum().backward()
    names = [gradient for gradient, _ in calls.seen]
    assert names == [f"{name}_grad_input", f"{name}_grad_values"]
    for gradient, inputs in calls.seen:
        op = getattr(torch.ops.sparsekern, gradient).default
        torch.library.opcheck(op, tuple(with_grads(inputs, (0, 1))))
