"""torch.func over sparse layers: transforms, per-sample gradients, batches as one product."""

import pytest
import torch
from ops_common import OPS, Calls, small
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import sparsekern as sk
from sparsekern.ops.nm_ste import nm_ste_linear
from sparsekern.ops.norm import batch_norm
from sparsekern.pool import ChannelsLastMaxPool2d

PATTERNS = {
    "csr": {"sparsity": 0.6},
    "block": {"pattern": "block:4x4", "sparsity": 0.5},
    "nm": {"pattern": "2:4"},
}
TRANSFORMS = {
    "grad": lambda f, x: grad(lambda z: f(z).square().sum())(x),
    "grad of grad": lambda f, x: grad(
        lambda z: grad(lambda z: f(z).square().sum())(z).square().sum()
    )(x),
    "third": lambda f, x: grad(lambda z: hessian(lambda z: f(z).sin().sum())(z).square().sum())(x),
    "vmap": lambda f, x: vmap(f)(x),
    "vmap inside": lambda f, x: vmap(f, in_dims=1, out_dims=1)(x.transpose(0, 1)),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(x.unsqueeze(1)),
    "per sample": lambda f, x: vmap(grad(lambda z: f(z).square().sum()))(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.sin(),))[1],
    "jvp of grad": lambda f, x: jvp(grad(lambda z: f(z).square().sum()), (x,), (x.sin(),))[1],
    "hessian": lambda f, x: hessian(lambda z: f(z).square().sum())(x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(lambda z: f(z).square().sum()))(x),
}


def layer_and_input(kind, format, activation="none"):
    options = {**PATTERNS[format], "activation": activation, "dtype": torch.float64}
    if kind == "linear":
        return sk.SparseLinear(12, 8, **options), torch.randn(3, 12, dtype=torch.float64)
    conv = sk.SparseConv2d(4, 8, 3, padding=1, **options)
    return conv, torch.randn(2, 4, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("format", PATTERNS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_transforms_give_what_the_dense_twin_gives(kind, format, activation, transform):
    layer, x = layer_and_input(kind, format, activation)
    run = TRANSFORMS[transform]
    torch.testing.assert_close(run(layer, x), run(layer.to_dense(), x))


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("format", PATTERNS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_per_sample_gradients_of_parameters(kind, format, activation):
    layer, x = layer_and_input(kind, format, activation)

    def loss(parameters, z):
        return functional_call(layer, parameters, (z,)).square().sum()

    parameters = dict(layer.named_parameters())
    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        alone = torch.autograd.grad(layer(x[i]).square().sum(), list(parameters.values()))
        for name, want in zip(parameters, alone, strict=True):
            torch.testing.assert_close(got[name][i], want)


@pytest.mark.parametrize("format", PATTERNS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_ensemble_of_values(kind, format):
    layer, x = layer_and_input(kind, format, "relu")
    values = torch.randn(3, *layer.weight.values.shape, dtype=torch.float64)
    bias = torch.randn(3, *layer.bias.shape, dtype=torch.float64)

    def run(values, bias):
        return functional_call(layer, {"weight.values": values, "bias": bias}, (x,))

    torch.testing.assert_close(
        vmap(run)(values, bias),
        torch.stack([run(v, b) for v, b in zip(values, bias, strict=True)]),
    )
    torch.testing.assert_close(
        vmap(run, in_dims=(None, 0))(values[0], bias),
        torch.stack([run(values[0], b) for b in bias]),
    )


@pytest.mark.parametrize("format", PATTERNS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_samples_are_one_product(kind, format):
    layer, x = layer_and_input(kind, format)
    with Calls() as calls:
        vmap(grad(lambda z: layer(z).square().sum()))(x)
    ending = "linear" if kind == "linear" else "conv2d"
    assert [name for name, _ in calls.seen] == [
        f"{format}_{ending}",
        f"{format}_{ending}_grad_input",
    ]


@pytest.mark.parametrize(("name", "sample"), small)
def test_vmap_of_every_op(name, sample):
    x, *rest = sample.build(torch.float64)
    many = torch.stack([x, x.sin(), -x], 1)
    rest = [r.sin() if 1 + i in sample.grads[2:] else r for i, r in enumerate(rest)]
    got = vmap(lambda x: OPS[name](x, *rest), in_dims=1)(many)
    want = torch.stack([OPS[name](x, *rest) for x in many.unbind(1)])
    torch.testing.assert_close(got, want)


def test_no_samples_at_all():
    layer, x = layer_and_input("linear", "csr")
    assert vmap(layer)(x[:0]).shape == (0, 8)
    values = layer.weight.values.detach().expand(0, -1)
    assert vmap(lambda v: functional_call(layer, {"weight.values": v}, (x,)))(values).shape == (
        0, 3, 8,
    )  # fmt: skip


def test_gradients_outside_of_the_transform():
    layer, x = layer_and_input("linear", "csr", "gelu")
    dense, ends = layer.to_dense(), []
    for module in (layer, dense):
        z = x.clone().requires_grad_()
        slope = grad(lambda z, module=module: module(z).square().sum())(z)
        (slope.square().sum() + vmap(module)(z).sum()).backward()
        ends.append(z.grad)
    torch.testing.assert_close(*ends)


def test_other_ops_in_batches_and_in_per_sample_gradients():
    x, weight = torch.randn(3, 5, 8), torch.randn(4, 8)
    torch.testing.assert_close(
        vmap(lambda x: nm_ste_linear(x, weight, None, 2, 4, False))(x),
        nm_ste_linear(x, weight, None, 2, 4, False),
    )
    images, scale = torch.randn(3, 2, 4, 5, 5), torch.ones(4)
    got = vmap(lambda x: batch_norm(x, scale, scale, 1e-5)[0])(images)
    torch.testing.assert_close(got[1], batch_norm(images[1], scale, scale, 1e-5)[0])
    pool = ChannelsLastMaxPool2d(2)
    slopes = vmap(grad(lambda x: pool(x).exp().sum()))(images)
    want = grad(lambda x: torch.nn.functional.max_pool2d(x, 2).exp().sum())(images[2])
    torch.testing.assert_close(slopes[2], want)
    torch.testing.assert_close(pool(images[0, 0]), pool(images[0])[0])


def test_forward_mode_without_a_rule_names_the_op():
    layer, x = layer_and_input("linear", "csr")
    layer = layer.float().eval()
    sk.quantize(torch.nn.Sequential(layer))
    with pytest.raises(RuntimeError, match="csr_linear_int8: expected gradients by backward"):
        jvp(layer, (x.float(),), (x.float(),))
    torch.testing.assert_close(jacrev(layer)(x.float()), jacrev(layer.to_dense())(x.float()))


def test_tangents_outside_of_torch_func():
    layer, x = layer_and_input("conv", "csr", "relu")
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        y = layer(torch.autograd.forward_ad.make_dual(x, x.cos()))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, jvp(layer.to_dense(), (x,), (x.cos(),))[1])


def test_compiled_transforms():
    layer, x = layer_and_input("linear", "csr", "gelu")
    for run in (TRANSFORMS["per sample"], TRANSFORMS["jvp"], TRANSFORMS["vmap"]):
        compiled = torch.compile(lambda x, run=run: run(layer, x), backend="aot_eager")
        torch.testing.assert_close(compiled(x), run(layer, x))
