"""Second derivatives through layers: as the dense twin has them, or an error that names the op."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sparsekern as sk
from sparsekern.norm import ContiguousBatchNorm2d
from sparsekern.ops.block_int8_dynamic import block_linear_int8_dynamic
from sparsekern.ops.nm_ste import nm_prune, nm_ste_linear, prune_reference
from sparsekern.ops.norm import batch_norm, batch_norm_grad
from sparsekern.pool import ChannelsLastMaxPool2d

PATTERNS = {
    "csr": {"sparsity": 0.6},
    "block": {"pattern": "block:4x4", "sparsity": 0.5},
    "nm": {"pattern": "2:4"},
}
ACTIVATIONS = ["none", "relu", "relu6", "gelu", "gelu_tanh"]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06}


def layer_and_input(kind, format, activation="none", dtype=torch.float64):
    options = {**PATTERNS[format], "activation": activation, "dtype": dtype}
    if kind == "linear":
        return sk.SparseLinear(24, 16, **options), torch.randn(5, 24, dtype=dtype)
    conv = sk.SparseConv2d(8, 12, 3, stride=2, padding=1, **options)
    return conv, torch.randn(2, 8, 9, 7, dtype=dtype)


def penalty_gradients(module, x, *parameters):
    """Gradients of a gradient penalty to x and to parameters."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    penalty = (slope.square().sum() - 1).square() / 1e4
    return torch.autograd.grad(penalty, [x, *parameters])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("format", PATTERNS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradient_penalty_is_that_of_the_dense_twin(kind, format, activation, dtype):
    layer, x = layer_and_input(kind, format, activation, dtype)
    dense = layer.to_dense().double()
    weight, bias = dense.parameters()
    got = penalty_gradients(layer, x, layer.weight.values, layer.bias)
    want = list(penalty_gradients(dense, x.double(), weight, bias))
    want[1] = layer.weight.gather(want[1])
    for g, w in zip(got, want, strict=True):
        limit = TOLERANCES[dtype] * max(1e-30, float(w.abs().max()))
        assert g.dtype == dtype and float((g.double() - w).abs().max()) <= limit


@pytest.mark.parametrize("format", PATTERNS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("alone", ["x", "values", "bias"])
def test_only_one_of_them_takes_gradients(kind, format, alone):
    layer, x = layer_and_input(kind, format, "gelu")
    dense = layer.to_dense()

    def second(module, parameters):
        inputs = {"x": x.clone(), "values": parameters[0], "bias": parameters[1]}
        for name, tensor in inputs.items():
            tensor.requires_grad_(name == alone)
        (first,) = torch.autograd.grad(
            module(inputs["x"]).square().sum(), inputs[alone], create_graph=True
        )
        return torch.autograd.grad(first.sin().sum(), inputs[alone])[0]

    got = second(layer, (layer.weight.values, layer.bias))
    if alone != "values":
        torch.testing.assert_close(got, second(dense, list(dense.parameters())))
        return
    # The sum of sines goes over what is stored.
    weight = dense[0].weight.detach().requires_grad_()
    twin = torch.func.functional_call
    parameters = {"0.weight": weight, "0.bias": dense[0].bias.detach()}
    (first,) = torch.autograd.grad(
        twin(dense, parameters, (x,)).square().sum(), weight, create_graph=True
    )
    (want,) = torch.autograd.grad(layer.weight.gather(first).sin().sum(), weight)
    torch.testing.assert_close(got, layer.weight.gather(want))


@pytest.mark.parametrize("format", PATTERNS)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_a_residual_has_second_derivatives(format, activation):
    layer, x = layer_and_input("conv", format, "none")
    dense = layer.to_dense()
    residual = torch.randn_like(layer(x)).requires_grad_()

    def second(function):
        moved = x.clone().requires_grad_()
        y = function(moved)
        slopes = torch.autograd.grad(y.square().sum(), [moved, residual], create_graph=True)
        return torch.autograd.grad(sum(s.sin().sum() for s in slopes), [moved, residual])

    act = {"none": lambda y: y, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[activation]
    got = second(lambda x: layer(x, residual, activation))
    want = second(lambda x: act(dense(x) + residual))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_relu_has_zeros_like_the_dense_twin():
    layer, x = layer_and_input("linear", "csr", "relu")
    x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    assert not second.any()


def test_a_compiled_model_refuses():
    layer, x = layer_and_input("linear", "csr", dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager")
    x.requires_grad_()
    (slope,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.square().sum().backward()


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("format", ["csr", "block", "nm"])
def test_frozen_int8_layers(format, activation):
    layer, x = layer_and_input("linear", format, activation, torch.float32)
    sk.quantize(torch.nn.Sequential(layer.eval()))
    assert layer.weight.values.dtype == torch.int8
    dense = layer.to_dense().requires_grad_(False)
    (got,), (want,) = penalty_gradients(layer, x), penalty_gradients(dense, x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_rounded_activations_pass_gradients_on_at_every_order():
    """As if nothing had been rounded: the slope is W^T grad, whose own derivative is W."""
    layer, x = layer_and_input("linear", "block", "none", torch.float32)
    sk.quantize(torch.nn.Sequential(layer.eval()))
    weight = layer.weight
    parts = (weight.values, weight.scales, weight.block_crow, weight.block_col)
    x.requires_grad_()
    y = block_linear_int8_dynamic(x, *parts, None, None, 16)
    grad = torch.randn_like(y).requires_grad_()
    (slope,) = torch.autograd.grad(y, x, grad, create_graph=True)
    change = torch.randn_like(slope)
    (got,) = torch.autograd.grad(slope, grad, change)
    torch.testing.assert_close(got, change @ weight.to_dense().t(), rtol=1e-4, atol=1e-4)


def test_straight_through_is_w_plus_a_constant():
    weight = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 12, dtype=torch.float64)

    def plain(x):
        shift = (prune_reference(weight, 2, 4, False) - weight).detach()
        return torch.tanh(x @ (weight + shift).t())

    def ours(x):
        return torch.tanh(nm_ste_linear(x, weight, None, 2, 4, False))

    for got, want in zip(
        penalty_gradients(ours, x, weight), penalty_gradients(plain, x, weight), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_batch_norm(activation):
    inputs = [torch.randn(3, 4, 5, 2), torch.rand(4) + 0.5, torch.randn(4)]
    inputs = [t.double().requires_grad_() for t in inputs]

    def normalise(*inputs):
        return batch_norm(*inputs, 1e-5, activation)[0]

    assert torch.autograd.gradgradcheck(normalise, inputs)


def test_pool():
    pool = ChannelsLastMaxPool2d(2)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: pool(x).exp(), (x,))


def test_ops_without_derivatives_say_so():
    weight = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"nm_prune: expected results that are not diff.*nm_ste"):
        nm_prune(weight, 2, 4, False).sum().backward()
    norm = ContiguousBatchNorm2d(3)
    grad, x = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    sums = (x.mean((0, 2, 3)), x.var((0, 2, 3)))
    slopes = batch_norm_grad(grad, x, *sums, norm.weight, norm.bias, 1e-5)
    with pytest.raises(RuntimeError, match=r"batch_norm_grad: expected results .* batch_norm is"):
        slopes[0].sum().backward()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_checkpoints(kind):
    """What is dropped is computed, and recorded, again: in the middle of a backward of ours."""
    layer, x = layer_and_input(kind, "csr", "gelu")
    model = torch.nn.Sequential(torch.nn.Tanh(), layer, torch.nn.Tanh(), torch.nn.Tanh())
    dense = torch.nn.Sequential(model[0], layer.to_dense(), *model[2:])

    def saved(x):
        return checkpoint(model, x, use_reentrant=False)

    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    saved(first).square().sum().backward()
    dense(second).square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(penalty_gradients(saved, x), penalty_gradients(dense, x))
