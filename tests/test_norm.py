"""batch_norm and its gradient on every instruction set, and the module that calls it."""

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import norm
from sparsekern.chain import shallow_copy
from sparsekern.norm import ContiguousBatchNorm2d, find_norms
from sparsekern.ops.norm import _grad_reference, _norm_reference, batch_norm, batch_norm_grad

EPS = 1e-5
# One pixel, rows shorter than a vector, ends of one to all lanes, several chunks of sums.
SHAPES = [(6, 3, 1, 1), (5, 4, 7, 7), (3, 2, 14, 14), (1, 5, 3, 11), (37, 2, 9, 10), (4, 1, 61, 53)]


def arguments(shape, dtype=torch.float32, mean=0.0):
    make = torch.Generator().manual_seed(sum(shape))
    x = mean + torch.randn(shape, generator=make, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=make, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def torch_norm(x, weight, bias, activation):
    y = nn.functional.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
    return {"none": y, "relu": y.relu(), "relu6": nn.functional.relu6(y)}[activation]


def away_from_kinks(x, weight, bias):
    """Where float32 and float64 agree on which side of 0 and 6 the output lies."""
    y = torch_norm(x, weight, bias, "none")
    return ((y.abs() > 1e-4) & ((y - 6).abs() > 1e-4)).double()


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_against_float64(shape, activation, mean, isa):
    parts = arguments(shape, mean=mean)
    exact = [part.double().requires_grad_() for part in parts]
    want = torch_norm(*exact, activation)
    grad = torch.randn(shape, dtype=torch.float64) * away_from_kinks(*exact).detach()
    leaves = [part.requires_grad_() for part in parts]
    got, average, var = batch_norm(*leaves, EPS, activation)
    slack = (1 + mean) * 2e-6  # x is rounded to a share of the mean
    torch.testing.assert_close(got.double(), want, rtol=slack, atol=3 * slack)
    assert got.is_contiguous() and not average.requires_grad and not var.requires_grad
    torch.testing.assert_close(average.double(), exact[0].mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        var.double(), exact[0].var((0, 2, 3), correction=0), rtol=1e-5, atol=0
    )
    grads = torch.autograd.grad(got, leaves, grad.float())
    for g, w in zip(grads, torch.autograd.grad(want, exact, grad), strict=True):
        scale = float(w.abs().max()) + 1e-3
        assert float((g.double() - w).abs().max()) <= 2e-5 * scale * (1 + mean / 10)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_float64_and_the_references_agree_with_torch(activation):
    parts = [part.requires_grad_() for part in arguments((3, 4, 5, 6), torch.float64)]
    grad = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    want = torch_norm(*parts, activation)
    wanted = torch.autograd.grad(want, parts, grad)
    for function in (batch_norm, _norm_reference):
        got, mean, var = function(*parts, EPS, activation)
        torch.testing.assert_close(got, want)
        for g, w in zip(torch.autograd.grad(got, parts, grad), wanted, strict=True):
            torch.testing.assert_close(g, w)
    x, weight, bias = (part.detach() for part in parts)
    for function in (batch_norm_grad, _grad_reference):
        grads = function(grad, x, mean.detach(), var.detach(), weight, bias, EPS, activation)
        for g, w in zip(grads, wanted, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradcheck_and_opcheck(activation):
    parts = [part.requires_grad_() for part in arguments((3, 2, 4, 5), torch.float64)]
    assert torch.autograd.gradcheck(lambda *p: batch_norm(*p, EPS, activation)[0], parts)
    x, weight, bias = arguments((3, 2, 4, 5))
    torch.library.opcheck(batch_norm, (x, weight, bias, EPS, activation))
    torch.library.opcheck(batch_norm, (x.requires_grad_(), weight, bias, EPS, activation))
    rest = (x.detach(), torch.zeros(2), torch.ones(2), weight, bias, EPS, activation)
    torch.library.opcheck(batch_norm_grad, (torch.randn(3, 2, 4, 5), *rest))


def test_nan_stays_in_its_channel(isa):
    x, weight, bias = arguments((2, 3, 5, 5))
    x[0, 1, 2, 2] = float("nan")
    y, mean, _ = batch_norm(x, weight, bias, EPS, "none")
    assert y[:, 1].isnan().all() and mean[1].isnan()
    assert y[:, ::2].isfinite().all()


def test_any_layout_comes_back_contiguous(isa):
    x, weight, bias = arguments((3, 4, 6, 6))
    last = x.contiguous(memory_format=torch.channels_last)
    want = batch_norm(x, weight, bias, EPS, "relu")[0]
    got = batch_norm(last, weight, bias, EPS, "relu")[0]
    assert got.is_contiguous() and torch.equal(got, want)


X, W = torch.zeros(2, 3, 4, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_norm(X[0], W, W, EPS), "batch_norm: expected x with 4 dimensions"),
        (lambda: batch_norm(X.half(), W, W, EPS), "x of dtype float32 or float64, got float16"),
        (lambda: batch_norm(X, W.double(), W, EPS), r"weight of the dtype of x \(float32\)"),
        (lambda: batch_norm(X, W, W[None], EPS), "bias with 1 dimensions"),
        (lambda: batch_norm(X, W[:2], W, EPS), r"weight.size\(0\) = channels = 3, got 2"),
        (lambda: batch_norm(X, W, W, EPS, "gelu"), "none, relu or relu6, got 'gelu'"),
        (lambda: batch_norm(X[:1, :, :1, :1], W, W, EPS), "more than one value per channel"),
        (lambda: batch_norm_grad(X[:1], X, W, W, W, W, EPS), r"x.size\(0\) = 2, got 1"),
        (lambda: batch_norm_grad(X[0], X, W, W, W, W, EPS), "grad with 4 dimensions"),
        (lambda: batch_norm_grad(X, X, W[:1], W, W, W, EPS), r"mean.size\(0\) = channels = 3"),
        (lambda: batch_norm_grad(X, X, W, W[None], W, W, EPS), "var with 1 dimensions"),
        (lambda: _norm_reference(X, W, W, EPS, "gelu"), "activation to be none, relu or relu6"),
    ],
)  # fmt: skip
def test_messages(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def pair(**options):
    plain = nn.BatchNorm2d(3, **options)
    plain.weight.data.uniform_(0.5, 2)
    plain.bias.data.uniform_(-1, 1)
    twin = shallow_copy(plain)
    twin.__class__ = ContiguousBatchNorm2d
    twin.original, twin.activation = (plain,), "none"
    twin._buffers = {k: b if b is None else b.clone() for k, b in plain._buffers.items()}
    return plain, twin


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.5, "eps": 1e-2}, {"track_running_stats": False}],
    ids=str,
)
def test_the_module_does_what_batchnorm2d_does(options):
    plain, twin = pair(**options)
    for seed in range(3):
        x = 2 + torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(twin(x), plain(x))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer)
    plain.eval(), twin.eval()
    torch.testing.assert_close(twin(x), plain(x))
    twin.activation = "relu"
    torch.testing.assert_close(twin(x), plain(x).relu())


def test_other_dtypes_go_to_torch():
    plain, twin = pair()
    x = torch.randn(4, 3, 5, 6).bfloat16()
    twin.activation = "relu"
    assert torch.equal(twin(x), plain(x).relu())


def test_single_values_are_refused_as_by_torch():
    _, twin = pair()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        twin.train()(torch.randn(1, 3, 1, 1))


def test_compiles_in_one_graph():
    _, twin = pair()
    twin.activation = "relu"
    x = torch.randn(4, 3, 5, 6)
    want = shallow_copy(twin)(x)
    got = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)


def test_which_normalisations_are_found():
    hooked = nn.BatchNorm2d(3)
    hooked.register_forward_hook(lambda *_: None)
    plain = nn.BatchNorm2d(3)
    model = nn.Sequential(plain, hooked, nn.BatchNorm2d(3, affine=False), nn.BatchNorm1d(3))
    assert find_norms(model) == {plain}


@pytest.mark.parametrize("behind", [None, (nn.ReLU(), "relu")])
def test_gain_is_measured_and_leaves_statistics(behind):
    plain, twin = pair()
    before = [b.clone() for b in plain.buffers()]
    spec = sk.tune.InputSpec.of(torch.randn(4, 3, 5, 6))
    assert 0 < norm._gain(plain, twin, behind, spec, 0.01) < 1e3
    assert all(torch.equal(b, c) for b, c in zip(before, plain.buffers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_nan_before_the_activation_lets_gradients_through(activation, dtype, isa):
    x, weight, bias = arguments((2, 4, 3, 7), dtype)
    bias[1], bias[2], bias[3] = torch.nan, torch.inf, -torch.inf
    grad = torch.ones_like(x)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    have = batch_norm_grad(grad, x, mean, var, weight, bias, EPS, activation)
    want = _grad_reference(grad, x, mean, var, weight, bias, EPS, activation)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    open_at = {"none": (1, 1, 1), "relu": (1, 1, 0), "relu6": (1, 0, 0)}[activation]
    assert have[2][1:].tolist() == [x[:, 0].numel() * one for one in open_at]


@pytest.mark.parametrize("shape", [(1, 1, 2900, 2900), (2, 1, 130, 127)])
def test_images_of_any_size_have_the_right_moments(shape, isa):
    """Of equal pixels, where float32 sums go wrong the same way at every step."""
    for pixel in (-0.5872, 0.3, 1.7):
        x = torch.full(shape, pixel)
        _, mean, var = batch_norm(x, torch.ones(1), torch.zeros(1), EPS)
        assert float(mean) == pytest.approx(pixel, rel=2e-5) and float(var) <= 1e-9
    grad = torch.full(shape, 0.3)
    *_, grad_bias = batch_norm_grad(grad, x, mean, var, torch.ones(1), torch.zeros(1), EPS)
    assert float(grad_bias) == pytest.approx(x.numel() * float(grad[0, 0, 0, 0]), rel=5e-5)
