"""Convolutions with csr and nm weights on CUDA: every way and gradient, on the interpreter.

The functions that are registered for CUDA run here on CPU tensors, our kernels on the interpreter.
The libraries' products are replaced by dense ones of the same operands.
"""

import pytest
import torch
from samples import SAMPLES, csr_of, random_nm, random_weight

from sparsekern.ops import conv, csr_conv_cuda, csr_cuda, nm_conv, nm_conv_cuda, nm_cuda
from sparsekern.ops._library import activate
from sparsekern.ops.csr_conv_triton import csr_conv, csr_conv_sddmm
from sparsekern.ops.nm_conv_triton import nm_conv as nm_conv_kernel
from sparsekern.ops.unfold_triton import fold, unfold

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(got, want, dtype=torch.float32, what=""):
    assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous(), what
    if got.numel():
        limit = TOLERANCE[dtype] * max(1.0, float(want.abs().max()))
        assert float((got.double() - want).abs().max()) <= limit, what


def double(arguments):
    floating = lambda a: isinstance(a, torch.Tensor) and a.is_floating_point()  # noqa: E731
    return [a.double() if floating(a) else a for a in arguments]


@pytest.fixture
def ways(monkeypatch):
    """Runs all ways of each op and keeps what they gave."""
    found = {}

    def run_all(key, candidates, like):
        found.update({(key[0], name): way() for name, way in candidates.items()})
        return candidates["dense"]()

    def spmm(record, kind, x, values, crow, col, algorithm, row_major):
        return x @ csr_cuda.dense_weight(values, crow, col, x.shape[1]).t()

    def product(x, weight, bias, rows, activation):
        return activate(torch.nn.functional.linear(x, weight, bias), activation, "test")

    for module in (csr_conv_cuda, nm_conv_cuda):
        monkeypatch.setattr(module, "run_fastest", run_all)
    monkeypatch.setattr(csr_cuda, "run_fastest", lambda key, ways, like: ways["dense"]())
    monkeypatch.setattr(nm_cuda, "run_fastest", lambda key, ways, like: ways["dense"]())
    monkeypatch.setattr(csr_cuda, "_ways_allowed", lambda op, x: (True, True))
    monkeypatch.setattr(csr_cuda, "kernel_fault", lambda device: "")
    monkeypatch.setattr(csr_cuda, "device_facts", lambda index: None)
    monkeypatch.setattr(csr_cuda, "_spmm", spmm)
    monkeypatch.setattr(nm_cuda, "kernel_fault", lambda device: "")
    monkeypatch.setattr(nm_cuda, "device_facts", lambda index: None)
    monkeypatch.setattr(nm_conv_cuda, "packed_way", lambda *a: lambda values, make: make())
    monkeypatch.setattr(nm_conv_cuda.cslt, "linear", product)
    return found


def all_close(ways, op, want):
    assert (op, "dense") in ways
    for (name, way), got in ways.items():
        if name == op:
            close(got, want, what=f"{op} by {way}")
    return {way for name, way in ways if name == op}


# The interpreter takes a millisecond for eight stored weights and 128 pixels: the small samples.
SMALL = [SAMPLES["csr_conv2d"][i] for i in (1, 3, 5, 7, 8, 11)]
NM = [s for s in SAMPLES["nm_conv2d"] if not s.uneven]  # the others are padded before they get here


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "noplan"])
@pytest.mark.parametrize("sample", SMALL, ids=lambda s: s.id)
def test_csr(sample, planned, ways):
    layout = torch.contiguous_format if planned else torch.channels_last
    x, values, crow, col, bias, _, _, *geometry, act = sample.build(torch.float32)
    x, groups, taps = (
        x.contiguous(memory_format=layout),
        geometry[4],
        geometry[0][0] * geometry[0][1],
    )
    plans = [None, None]
    if planned:
        sizes = (x.shape[1] // groups * taps, groups, taps)
        plans = [csr_cuda._plan(crow, col, *sizes, transpose=t) for t in (False, True)]
    got = csr_conv_cuda._conv(x, values, crow, col, bias, *plans, *geometry, act)
    exact = double((x, values, crow, col, bias, None, None))
    want = conv._conv_reference(*exact, *geometry, act)
    close(got, want)
    grad, pointwise = torch.randn(want.shape), csr_conv_cuda.is_pointwise(*geometry[:3], groups)
    if not pointwise:
        found = all_close(ways, conv.CONV, want)
        full = got.numel() and values.numel()
        assert ("direct" in found) == bool(full)
        assert ("unfolded cusparse 3c" in found) == bool(full and planned and groups == 1)
    got = csr_conv_cuda._grad_input(
        grad.contiguous(memory_format=layout), values, crow, col, plans[1], *x.shape[1:], *geometry
    )
    want = conv._grad_input_reference(
        *double((grad, values, crow, col, None)), *x.shape[1:], *geometry
    )
    close(got, want)
    if not pointwise:
        all_close(ways, "csr_conv2d_grad_input", want)
    got = csr_conv_cuda._grad_values(grad, x, crow, col, plans[0], *geometry)
    want = conv._grad_values_reference(*double((grad, x, crow, col, None)), *geometry)
    close(got, want)
    if not pointwise:
        all_close(ways, "csr_conv2d_grad_values", want)


def test_few_pixels_take_the_kernel_of_few_tokens(ways):
    values, crow, col = csr_of(random_weight(12, 8 * 9, 0.6).float())
    x, geometry = torch.randn(1, 8, 4, 5), ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    plan = csr_cuda._plan(crow, col, 72, 1, 9)
    csr_conv_cuda._conv(x, values, crow, col, None, plan, None, *geometry, "relu")
    want = conv._conv_reference(
        *double((x, values, crow, col)), None, None, None, *geometry, "relu"
    )
    close(ways[conv.CONV, "unfolded decode"], want)


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "noplan"])
@pytest.mark.parametrize("sample", NM, ids=lambda s: s.id)
def test_nm(sample, planned, ways):
    layout = torch.contiguous_format if planned else torch.channels_last
    x, values, index, bias, _, _, *nm, kernel, stride, padding, dilation, groups, act = (
        sample.build(torch.float32)
    )
    geometry, plans = (kernel, stride, padding, dilation, groups), [None, None]
    x, taps = x.contiguous(memory_format=layout), kernel[0] * kernel[1]
    if planned:
        sizes = (index.shape[0], x.shape[1] // groups, *nm, groups, taps)
        plans = [nm_cuda._plan(index, *sizes, transpose=t) for t in (False, True)]
    got = nm_conv_cuda._conv(x, values, index, bias, *plans, *nm, *geometry, act)
    exact = double((x, values, index, bias, None, None))
    want = nm_conv._conv_reference(*exact, *nm, *geometry, act)
    close(got, want)
    pointwise = csr_conv_cuda.is_pointwise(*geometry[:3], groups)
    if not pointwise:
        found = all_close(ways, nm_conv.CONV, want)
        assert ("implicit" in found) == bool(got.numel() and groups == 1)
    grad = torch.randn(want.shape)
    got = nm_conv_cuda._grad_input(grad, values, index, plans[1], *x.shape[1:], *nm, *geometry)
    exact = double((grad, values, index, None))
    want = nm_conv._grad_input_reference(*exact, *x.shape[1:], *nm, *geometry)
    close(got, want)
    got = nm_conv_cuda._grad_values(grad, x, index, plans[1], *nm, *geometry)
    exact = double((grad, x, index, None))
    close(got, nm_conv._grad_values_reference(*exact, *nm, *geometry))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_transposable_weight_gives_its_input_gradient_by_cusparselt(stride, ways):
    from sparsekern.patterns import parse
    from sparsekern.weights import NMWeight

    weight = torch.randn(16, 8, 3, 3)
    held = NMWeight.from_dense(weight, parse("2:4T").mask(weight.abs()), "2:4T")
    geometry = ((3, 3), (stride, stride), (1, 1), (1, 1), 1)
    plan_t = nm_cuda._plan(held.index, 16, 8, 2, 4, 1, 9, transpose=True)
    grad = torch.randn(2, 16, *conv.output_size((7, 6), *geometry[:4]))
    values = held.values.detach()
    got = nm_conv_cuda._grad_input(grad, values, held.index, plan_t, 8, 7, 6, 2, 4, *geometry)
    exact = double((grad, values, held.index, None))
    want = nm_conv._grad_input_reference(*exact, 8, 7, 6, 2, 4, *geometry)
    close(got, want)
    assert all_close(ways, "nm_conv2d_grad_input", want) == {"dense", "cusparselt"}


GEOMETRIES = {
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1), 1),
    "odd": ((2, 3), (2, 1), (0, 2), (1, 2), 1),
    "groups": ((3, 1), (1, 2), (1, 0), (1, 1), 2),
}
# Every geometry in float32, one in 16 bits.
CASES = [
    *((name, torch.float32) for name in GEOMETRIES), ("odd", torch.float16), ("odd", torch.bfloat16)
]  # fmt: skip
cases = pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)


@cases
def test_direct_kernels(name, dtype):
    kernel, stride, _, dilation, groups = geometry = GEOMETRIES[name]
    values, crow, col = csr_of(
        random_weight(10, 6 // groups * kernel[0] * kernel[1], 0.5, "skewed")
    )
    x, bias = torch.randn(3, 6, 9, 8).to(dtype), torch.randn(10).to(dtype)
    values = values.to(dtype)
    exact = double((x, values, crow, col, bias, None, None))
    want = conv._conv_reference(*exact, *geometry, "gelu")
    image = csr_conv_cuda.padded(x, want.shape[2:], geometry)
    y = torch.full(want.shape, torch.nan, dtype=dtype)
    got = csr_conv(image, values, (crow, col), bias, y, kernel, stride, dilation, groups, "gelu")
    close(got, want, dtype)
    grad = torch.randn(want.shape).to(dtype)
    index = (csr_conv_cuda.rows_of(crow, col), col)
    got = csr_conv_sddmm(grad, image, index, kernel, stride, dilation, groups)
    exact = double((grad, x, crow, col, None))
    close(got, conv._grad_values_reference(*exact, *geometry), dtype)


@pytest.mark.parametrize(("split", "act"), [(1, "relu6"), (3, "none")])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (2, 7)])
def test_implicit_kernel(n, m, split, act):
    geometry = GEOMETRIES["odd"]
    values, index = random_nm(70, 3 * m, n, m, 6)
    x, bias = torch.randn(2, 3 * m, 9, 8), torch.randn(70)
    values = values.float()
    exact = double((x, values, index, bias, None, None))
    want = nm_conv._conv_reference(*exact, n, m, *geometry, act)
    last = x.contiguous(memory_format=torch.channels_last)
    y = torch.full(want.shape, torch.nan)
    got = nm_conv_kernel(last, values, index, bias, y, geometry[:4], n, m, act, split)
    close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_implicit_kernel_in_16_bits(dtype):
    geometry = GEOMETRIES["3x3"]
    values, index = random_nm(20, 72, 2, 4, 9)
    x, values = torch.randn(1, 72, 5, 4).to(dtype), values.to(dtype)
    exact = double((x, values, index, None, None, None))
    want = nm_conv._conv_reference(*exact, 2, 4, *geometry, "none")
    last, y = x.contiguous(memory_format=torch.channels_last), x.new_empty(want.shape)
    close(nm_conv_kernel(last, values, index, None, y, geometry[:4], 2, 4), want, dtype)


@pytest.mark.parametrize("tap_major", [True, False])
@cases
def test_there_and_back(name, dtype, tap_major):
    """Against torch's own; the gradient of one is the other."""
    kernel, stride, padding, dilation, _ = GEOMETRIES[name]
    options = {"dilation": dilation, "padding": padding, "stride": stride}
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 5, 9, 8).to(dtype).contiguous(memory_format=layout)
        want = torch.nn.functional.unfold(x, kernel, **options)
        taps = kernel[0] * kernel[1]
        order = want.unflatten(1, (5, taps)).transpose(1, 2).flatten(1, 2) if tap_major else want
        got = unfold(x, GEOMETRIES[name][:4], tap_major)
        assert torch.equal(got, order.transpose(1, 2).reshape(got.shape))
    columns = torch.randn(got.shape).to(dtype)
    parts = columns.double().unflatten(0, (2, -1)).transpose(1, 2)
    if tap_major:
        parts = parts.unflatten(1, (taps, 5)).transpose(1, 2).flatten(1, 2)
    want = torch.nn.functional.fold(parts, (9, 8), kernel, **options)
    close(fold(columns, x.shape, GEOMETRIES[name][:4], tap_major), want, dtype)


def test_what_is_not_stored_touches_nothing():
    values, crow, col = csr_of(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # of a 2x2 kernel the first
    x = torch.ones(1, 1, 3, 3)
    x[..., 2, :], x[..., :, 2] = torch.nan, torch.inf
    y = torch.empty(1, 1, 2, 2)
    got = csr_conv(x, values, (crow, col), None, y, (2, 2), (1, 1), (1, 1), 1)
    assert torch.equal(got, torch.ones(1, 1, 2, 2))


def test_zeros_between_pixels_keep_the_layout():
    grad = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    spread = csr_conv_cuda.insert_zeros(grad, (2, 3))
    assert spread.shape == (2, 3, 7, 13) and torch.equal(spread[:, :, ::2, ::3], grad)
    assert spread.is_contiguous(memory_format=torch.channels_last)
    assert csr_conv_cuda.insert_zeros(grad, (1, 1)) is grad
    assert float(spread.abs().sum()) == pytest.approx(float(grad.abs().sum()))
