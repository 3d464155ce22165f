"""8-bit N:M values: the op, the weights, quantize, files."""

import copy
import io
import pickle

import pytest
import torch
from samples import random_nm
from torch import nn

import sparsekern as sk
from sparsekern.ops.nm import nm_to_dense
from sparsekern.ops.nm_int8 import (
    dequantize_rows,
    from_bytes,
    nm_linear_int8,
    quantize_tokens,
    to_bytes,
)

KINDS = {"int8": sk.Int8NMWeight, "float8": sk.Float8NMWeight}
DYNAMIC = {"int8": sk.DynamicInt8NMWeight, "float8": sk.DynamicFloat8NMWeight}
DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
kinds = pytest.mark.parametrize("kind", KINDS)


def parts(kind, rows=40, cols=52, n=2, m=4):
    values, index = random_nm(rows, cols, n, m)
    return *KINDS[kind].quantized(values.float(), (index,), (rows, cols)), index


def exact(x, values, scales, index, n, m, bias=None, dynamic=False):
    """In float64, from the stored values."""
    wide = dequantize_rows(values, scales).double()
    if dynamic:
        rounded, tokens = quantize_tokens(x, values.dtype)
        x = from_bytes(rounded).double() * tokens
    weight = nm_to_dense("test", wide, index, x.shape[-1], n, m)
    return nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


def layer(kind="int8", activation="none", activations="float", **options):
    made = sk.SparseLinear(64, 48, pattern="2:4", activation=activation, **options)
    sk.quantize(made, dtype=DTYPES[kind], activations=activations)
    assert type(made.weight) is (KINDS if activations == "float" else DYNAMIC)[kind]
    return made.eval()


@kinds
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 17, (2, 3, 5)], ids=str)
def test_matches_float64(tokens, dynamic, kind):
    shape = tokens if isinstance(tokens, tuple) else (tokens,)
    for n, m, cols in ((2, 4, 52), (1, 2, 30), (4, 8, 44)):
        w, x, bias = parts(kind, 40, cols, n, m), torch.randn(*shape, cols), torch.randn(40)
        plan = torch.ops.sparsekern.nm_plan(w[2], 40, cols, n, m)
        for p in (plan, None):
            y = nm_linear_int8(x, *w, bias, p, n, m, dynamic, "none")
            want = exact(x, *w, n, m, bias, dynamic)
            assert y.dtype == torch.float32 and y.is_contiguous()
            torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)
        low = nm_linear_int8(x.bfloat16(), *w, bias.bfloat16(), plan, n, m, dynamic)
        want = exact(x.bfloat16(), *w, n, m, bias.bfloat16(), dynamic)
        torch.testing.assert_close(low.double(), want, rtol=2**-7, atol=1e-2)


@kinds
def test_opcheck_and_compile(kind):
    w, x = parts(kind), torch.randn(20, 52, requires_grad=True)
    for dynamic in (False, True):
        arguments = (x, *w, torch.randn(40), None, 2, 4, dynamic, "gelu")
        torch.library.opcheck(nm_linear_int8, arguments)
    made = layer(kind, "gelu", activations="dynamic")
    compiled = torch.compile(made, fullgraph=True, dynamic=True)
    for tokens in (20, 5):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x), made(x))


@kinds
def test_rounding(kind):
    stored = torch.int8 if kind == "int8" else torch.uint8
    values, scales, _ = parts(kind)
    largest = 127 if kind == "int8" else 448
    assert float(from_bytes(values).abs().amax(1).max()) == largest and bool((scales > 0).all())
    assert not bool((from_bytes(to_bytes(torch.tensor([-1e-9, -0.0]), stored)).signbit()).any())
    rounded, tokens = quantize_tokens(torch.tensor([[0.0, 0.0], [-3.0, 1.5]]), stored)
    assert from_bytes(rounded)[1, 0] == -largest and bool((tokens > 0).all())
    back = from_bytes(rounded) * tokens
    torch.testing.assert_close(back[1], torch.tensor([-3.0, 1.5]), rtol=0.04, atol=0)
    assert quantize_tokens(torch.zeros(3, 0), stored)[0].shape == (3, 0)


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
@kinds
def test_frozen_weights_pass_gradients_on(kind, act):
    """Through rounded tokens as if they had not been rounded."""
    made = layer(kind, act)
    twin, x = made.to_dense(), torch.randn(20, 64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(a).sum().backward()
    twin(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    bias = (twin if act == "none" else twin[0]).bias
    torch.testing.assert_close(made.bias.grad, bias.grad)
    c, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    made = layer(kind, act, activations="dynamic")
    made(c).sum().backward()
    made.to_dense()(b).sum().backward()
    if act == "none":
        torch.testing.assert_close(c.grad, b.grad, rtol=1e-4, atol=1e-5)


@kinds
def test_quantize_reports(kind):
    model = nn.Sequential(
        sk.SparseLinear(64, 96, pattern="2:4", activation="relu"),
        sk.SparseLinear(96, 32, pattern="2:4"),
    ).eval()
    x, errors = torch.randn(30, 64), []
    for activations in ("float", "dynamic"):
        twin = copy.deepcopy(model)
        report = sk.quantize(twin, x, DTYPES[kind], activations)
        change = float(((twin(x) - model(x)).norm() / model(x).norm()).detach())
        assert 0 < change < (0.02 if kind == "int8" else 0.08)
        for row in report.layers:
            assert row.bytes_after == row.bytes_before // 4 + 4 * row.shape[0]
            assert 0 < row.error < 0.06
            assert row.format == f"nm_{kind}{'_dynamic' if activations == 'dynamic' else ''}"
        errors.append(report.layers[0].error)
        assert f"quantize, {report.dtype}" in str(report) and report.dtype.startswith(kind)
        assert ["get slower on the CPU" in note for note in report.notes] == [True]
        assert report.to_dict()["notes"] == report.notes
        assert sk.report(twin[0]).layers[0].format == report.layers[0].format
    assert errors[1] > errors[0]  # what rounding the tokens costs is counted


def test_other_formats_stay_weight_only_and_the_report_says_so():
    model = nn.Sequential(
        sk.SparseLinear(16, 16, sparsity=0.5), sk.SparseLinear(16, 8, pattern="2:4")
    )
    report = sk.quantize(model, activations="dynamic")
    assert [row.format for row in report.layers] == ["csr_int8", "nm_int8_dynamic"]
    assert report.weight_only == {"0": "no products of int8 for format csr"}
    assert "0: weight only, no products of int8 for format csr" in str(report)
    with pytest.raises(
        ValueError, match="expected activations to be 'float' or 'dynamic', got True"
    ):
        sk.quantize(sk.SparseLinear(16, 8, pattern="2:4"), activations=True)
    with pytest.raises(ValueError, match="got : no float8 kernel for format csr"):
        sk.quantize(sk.SparseLinear(16, 8, sparsity=0.5), dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="got : its values are float8 already"):
        sk.quantize(layer("float8"))
    with pytest.raises(ValueError, match=r"no int8 kernel for inputs of torch\.float64"):
        sk.quantize(sk.SparseLinear(8, 8, pattern="2:4", dtype=torch.float64))
    broken = sk.SparseLinear(8, 8, pattern="2:4")
    broken.weight.values.data[0] = torch.inf
    with pytest.raises(ValueError, match="expected finite weights, got NaN or infinity"):
        sk.quantize(broken)


@kinds
def test_copies_dtypes_and_state(kind):
    made, x = layer(kind, "relu", activations="dynamic"), torch.randn(9, 64)
    want = made(x)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = layer(kind, "relu", activations="dynamic")
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), other):
        assert torch.equal(twin(x), want)
    bits = made.weight.values.clone()
    low = made.to(torch.bfloat16)
    assert torch.equal(low.weight.values, bits) and low.weight.scales.dtype == torch.float32
    torch.testing.assert_close(low(x.bfloat16()).float(), want, rtol=0.05, atol=0.05)
    with pytest.raises(RuntimeError, match="expected a model in eval mode, got one in tr"):
        layer(kind).train()(x)
    with pytest.raises(RuntimeError, match="expected inference, got a request to train"):
        made.prepare_training()


@pytest.mark.parametrize("activations", ["float", "dynamic"])
@kinds
def test_saved_and_loaded_into_every_kind(kind, activations, tmp_path):
    made, x, path = layer(kind, activations=activations), torch.randn(9, 64), tmp_path / "m"
    sk.save(made, path)
    twin, wide, dense = (
        layer(kind, activations=activations),
        sk.SparseLinear(64, 48, pattern="2:4"),
        nn.Linear(64, 48),
    )
    sk.load(twin, path)
    assert torch.equal(twin(x), made(x))
    close = {"rtol": 1e-4, "atol": 1e-5 if activations == "float" else 0.1}
    for target in (wide, dense):
        sk.load(target, path)
        torch.testing.assert_close(target(x), made(x), **close)
    sk.save(wide, path)
    sk.load(twin, path)  # quantized on the way in
    torch.testing.assert_close(twin(x), made(x), rtol=1e-4, atol=1e-5)
    sk.save(dense, path)
    sk.load(twin, path)
    torch.testing.assert_close(twin(x), made(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": lambda t: t.float()}, "expected values of int8, got torch.float32"),
        (
            {"values": lambda t: t[:, 1:]},
            r"expected values \(40, 26\) in int8, got torch.int8 of shape",
        ),
        ({"scales": lambda t: -t}, "expected scales above 0, got others"),
        ({"index": lambda t: t.int()}, r"expected index \(40, 7\) in uint8, got torch.int32"),
        ({"index": lambda t: t * 0}, "expected positions that rise inside each group"),
    ],
)
def test_messages(change, message):
    made = dict(zip(("values", "scales", "index"), parts("int8")))
    made |= {name: f(made[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=f"Int8NMWeight: {message}"):
        sk.Int8NMWeight(*made.values(), (40, 52), "2:4")


def test_more_messages():
    values, scales, index = parts("float8")
    with pytest.raises(
        ValueError, match="Float8NMWeight: expected float8 values without NaN, got NaN"
    ):
        sk.Float8NMWeight(torch.full_like(values, 127), scales, index, (40, 52), "2:4")
    with pytest.raises(
        ValueError, match=r"Float8NMWeight: expected values of uint8, got torch\.int8"
    ):
        sk.Float8NMWeight(values.view(torch.int8), scales, index, (40, 52), "2:4")
    with pytest.raises(ValueError, match="Int8NMWeight: expected an N:M pattern, got unstructured"):
        sk.Int8NMWeight(values, scales, index, (40, 52), "unstructured")
    with pytest.raises(ValueError, match=r"expected dtype torch.int8 or torch.float8_e4m3fn, got"):
        sk.quantize(layer(), dtype=torch.uint8)
