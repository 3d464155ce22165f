"""int8 values with a scale per row: the op, the weight, the layer, files."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import csr_of, random_weight
from torch import nn

import sparsekern as sk
from sparsekern import choose
from sparsekern._load import _C
from sparsekern.measure.memory import weight_bytes
from sparsekern.ops.csr import csr_plan
from sparsekern.ops.csr_int8 import _reference, csr_linear_int8, dequantize
from sparsekern.weights_int8 import quantize_rows

native = pytest.mark.skipif(_C is None, reason="tests the messages of the compiled ops")


def parts(rows=40, cols=51, sparsity=0.7, kind="uniform"):
    values, crow, col = csr_of(random_weight(rows, cols, sparsity, kind).float())
    return *quantize_rows(values, crow), crow, col


def exact(x, values, scales, crow, col, bias=None):
    """In float64, from the stored int8 values."""
    wide = [t.double() if t is not None else None for t in (x, bias)]
    dense = torch.zeros(crow.numel() - 1, x.shape[-1], dtype=torch.float64)
    row = torch.repeat_interleave(torch.arange(crow.numel() - 1), crow.diff().long())
    dense[row, col.long()] = values.double() * scales.double()[row]
    return nn.functional.linear(wide[0], dense, wide[1])


def layer(activation="none", bias=True, **options):
    made = sk.SparseLinear(64, 48, bias, sparsity=0.8, activation=activation, **options)
    sk.quantize(made)
    return made.eval()


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 17, 130, (2, 3, 5)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("planned", [True, False], ids=["plan", "noplan"])
def test_matches_float64(tokens, sparsity, planned, isa):
    shape = tokens if isinstance(tokens, tuple) else (tokens,)
    w = parts(131, 70, sparsity, "skewed")
    x, bias = torch.randn(*shape, 70), torch.randn(131)
    plan = csr_plan(w[2], w[3], 70) if planned else None
    y = csr_linear_int8(x, *w, bias, plan)
    assert y.dtype == torch.float32 and y.shape == (*shape, 131)
    torch.testing.assert_close(y.double(), exact(x, *w, bias), rtol=1e-5, atol=1e-4)
    low = csr_linear_int8(x.bfloat16(), *w, bias, plan)
    assert low.dtype == torch.bfloat16
    want = exact(x.bfloat16(), *w, bias)
    torch.testing.assert_close(low.double(), want, rtol=2**-8, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(0, 140),
    cols=st.integers(1, 150),
    rows=st.integers(1, 150),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_property(tokens, cols, rows, sparsity):
    w, x = parts(rows, cols, sparsity), torch.randn(tokens, cols)
    got = csr_linear_int8(x, *w)
    torch.testing.assert_close(got.double(), exact(x, *w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_reference_and_activations(act, tokens, isa):
    w, x, bias = parts(), torch.randn(tokens, 51), torch.randn(40)
    torch.testing.assert_close(
        csr_linear_int8(x, *w, bias, None, act), _reference(x, *w, bias, None, act)
    )


def test_opcheck_and_compile():
    w, x = parts(), torch.randn(20, 51)
    torch.library.opcheck(csr_linear_int8, (x, *w, torch.randn(40), csr_plan(w[2], w[3], 51)))
    made = layer("gelu")
    compiled = torch.compile(made, fullgraph=True, dynamic=True)
    for tokens in (20, 5, 1):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x), made(x))


def test_quantization_rounds_to_the_nearest_of_255_levels():
    values, crow, _ = csr_of(random_weight(30, 80, 0.5, "skewed").float())
    q, scales = quantize_rows(values, crow)
    row = torch.repeat_interleave(torch.arange(30), crow.diff().long())
    error = (dequantize(q, scales, crow) - values).abs()
    assert torch.all(error <= 0.5001 * scales[row]) and q.min() >= -127
    for r in range(30):
        if crow[r] < crow[r + 1]:
            mine = q[crow[r] : crow[r + 1]]
            assert int(mine.abs().max()) == 127
    zeros, tiny = quantize_rows(torch.tensor([0.0, 1e-44]), torch.tensor([0, 1, 2, 2]).int())
    assert zeros.tolist() == [0, 0] and bool((tiny > 0).all())


def test_quantize_reports_bytes_and_errors():
    model = nn.Sequential(
        sk.SparseLinear(64, 96, sparsity=0.7, activation="relu"),
        nn.Linear(96, 96),
        sk.SparseLinear(96, 32, sparsity=0.7),
    ).eval()
    before, x = copy.deepcopy(model), torch.randn(30, 64)
    report = sk.quantize(model, x)
    assert [row.name for row in report.layers] == ["0", "2"]
    for row in report.layers:
        assert 0 < row.error < 0.01
        nnz, rows = row.bytes_before // 4, row.shape[0]
        assert row.bytes_after == nnz + 4 * rows
    change = (model(x) - before(x)).norm() / before(x).norm()
    assert 0 < change < 0.02
    assert "0.0" in report.table() and "output error" in str(report)
    assert report.to_dict()["layers"][0]["name"] == "0"
    assert weight_bytes(model[2].weight) < weight_bytes(before[2].weight)
    assert sk.quantize(copy.deepcopy(before)).layers[0].error is None
    assert "Int8CSRWeight((96, 64)" in repr(model[0])


def test_the_report_of_a_conversion_names_int8(monkeypatch):
    monkeypatch.setattr(choose, "HEURISTIC", {"Linear": 0.5})
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    for layer, pattern in zip(model, ("unstructured", "block:16x16"), strict=False):
        sk.prune(layer, method="magnitude", sparsity=0.75, pattern=pattern)
    sk.convert_to_sparse(model)
    before = [row.format for row in sk.report(model).layers]
    assert before == ["csr", "block", "dense"]
    sk.quantize(model)
    for _ in range(2):  # asking twice adds nothing
        rows = sk.report(model).layers
        assert [row.format for row in rows] == ["csr_int8", "block_int8", "dense"]
        assert rows[0].reason.count("int8 since, the times are those of float values") == 1
        assert "int8" not in rows[2].reason
    assert "block_int8" in sk.report(model).table()
    assert sk.report(model).n_sparse == 2
    assert sk.report(model[0]).layers[0].format == "csr_int8"


def test_layers_that_share_a_weight_go_on_sharing_it():
    a = sk.SparseLinear(32, 32, sparsity=0.5)
    b = sk.SparseLinear(32, 32, sparsity=0.5)
    b.weight = a.weight
    model = nn.Sequential(a, b).eval()
    assert len(sk.quantize(model).layers) == 2
    assert model[0].weight is model[1].weight
    assert isinstance(model[0].weight, sk.Int8CSRWeight)


def test_quantize_leaves_what_it_cannot_do_and_says_so():
    model = nn.Sequential(sk.SparseConv2d(4, 4, 3, sparsity=0.5), nn.Flatten())
    model.append(sk.SparseLinear(16, 8, sparsity=0.5))
    report = sk.quantize(model)
    assert report.skipped == {"0": "convolutions keep their dtype"}
    assert "0: convolutions keep" in report.table()
    with pytest.raises(ValueError, match=r"got : no int8 kernel for inputs of torch\.float64"):
        sk.quantize(sk.SparseLinear(16, 8, pattern="2:4", dtype=torch.float64))
    with pytest.raises(ValueError, match=r"sparse linear layers, got .*its values are int8 alre"):
        sk.quantize(model)
    with pytest.raises(ValueError, match="expected a model with sparse linear layers, got none"):
        sk.quantize(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"inputs of torch\.float64"):
        sk.quantize(sk.SparseLinear(8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="on the meta device"):
        sk.quantize(sk.SparseLinear(8, 8, device="meta"))
    with pytest.raises(
        ValueError, match=r"quantize: expected dtype torch\.int8 or .*, got torch\.uint8"
    ):
        sk.quantize(sk.SparseLinear(8, 8), dtype=torch.uint8)
    with pytest.raises(TypeError, match="quantize"):
        sk.quantize(sk.SparseLinear(8, 8), 3)
    broken = sk.SparseLinear(8, 8)
    broken.weight.values.data[0] = math.nan
    with pytest.raises(ValueError, match="expected finite weights, got NaN or infinity"):
        sk.quantize(nn.Sequential(sk.SparseLinear(8, 8), broken))


def test_copies_and_files(tmp_path):
    made, x = layer("relu"), torch.randn(9, 64)
    want = made(x)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = sk.SparseLinear(64, 48, sparsity=0.3, activation="relu").eval()
    sk.quantize(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), other):
        assert torch.equal(twin(x), want)
    names = {"bias", "weight.values", "weight.scales", "weight.crow", "weight.col"}
    assert set(made.state_dict()) == {*names, "weight.needs_sk_load_or_sk_to_dense"}
    with pytest.raises(RuntimeError, match=r"expected values of int8, got torch\.float32"):
        bad = made.state_dict()
        bad["weight.values"] = bad["weight.values"].float()
        made.load_state_dict(bad)
    with pytest.raises(RuntimeError, match="expected scales above 0, got others"):
        bad = copy.deepcopy(made.state_dict())
        bad["weight.scales"][3] = -1
        made.load_state_dict(bad)


@pytest.mark.parametrize("sparsity", [0.5, 0.99], ids=["mask", "csr"])
def test_saved_and_loaded_into_every_kind(tmp_path, sparsity):
    made = sk.SparseLinear(64, 48, sparsity=sparsity).eval()
    wide = copy.deepcopy(made)
    sk.quantize(made)
    x, path = torch.randn(9, 64), tmp_path / "m.safetensors"
    sk.save(made, path)
    small, large = path.stat().st_size, sk.save(wide, tmp_path / "w.safetensors").stat().st_size
    if sparsity == 0.5:  # a layer of 48 x 15 values would hide it behind the header
        assert small < 0.6 * large
    twin = sk.SparseLinear(64, 48, sparsity=0.2).eval()
    sk.quantize(twin)
    sk.load(twin, path)
    assert torch.equal(twin(x), made(x))
    floating, dense = sk.SparseLinear(64, 48, sparsity=0.2), nn.Linear(64, 48)
    for target in (floating, dense):
        sk.load(target, path)
        torch.testing.assert_close(target(x), made(x))
    sk.load(twin, tmp_path / "w.safetensors")  # quantized on the way in, at the same positions
    assert torch.equal(twin(x), made(x))
    sk.save(dense, path)
    sk.load(twin, path)
    torch.testing.assert_close(twin(x), made(x))


@pytest.mark.parametrize("format", ["nm", "block"])
def test_files_of_other_formats(tmp_path, format):
    pattern, sparsity = ("2:4", None) if format == "nm" else ("block:4x4", 0.5)
    other = sk.SparseLinear(64, 48, pattern=pattern, sparsity=sparsity, format=format).eval()
    path, x = sk.save(other, tmp_path / "m.safetensors"), torch.randn(9, 64)
    made = layer()
    sk.load(made, path)
    assert made.weight.pattern == pattern and made.weight.format == "csr_int8"
    torch.testing.assert_close(made(x), other(x), rtol=0.02, atol=0.02)
    want = made(x)
    sk.save(made, path)
    sk.load(other, path)
    torch.testing.assert_close(other(x), want)


def test_files_that_do_not_fit(tmp_path):
    made, dense = layer(bias=False), nn.Linear(64, 48, bias=False)
    path, before = tmp_path / "m.safetensors", copy.deepcopy(made.state_dict())
    wide = sk.SparseLinear(64, 48, bias=False)
    wide.weight.values.data[0] = math.nan
    sk.save(wide, path)
    with pytest.raises(ValueError, match=r"fits format csr_int8 .*expected finite weights"):
        sk.load(made, path)
    sk.save(dense, path)
    with pytest.raises(ValueError, match="to be zero outside the pattern"):
        sk.load(made, path)
    assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())


def test_a_folded_file_gives_an_int8_layer_its_bias(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(64, 48, bias=False), nn.BatchNorm1d(48)).eval()

    source, target, x = model(), model(), torch.randn(9, 64)
    source[1].bias.data.normal_()
    sk.fold_batchnorm(source, x)
    for m in (source, target):
        m[0] = sk.SparseLinear.from_dense(m[0], sparsity=0.5)
        sk.quantize(m)
    sk.load(target, sk.save(source, tmp_path / "m.safetensors"))
    assert target[0].bias.dtype == torch.float32
    torch.testing.assert_close(target(x), source(x))


def test_nan_and_inf_spread_where_a_weight_is_stored(isa):
    weight = torch.zeros(3, 40)
    weight[0, 5], weight[1, 6] = 2.0, 3.0
    values, crow, col = csr_of(weight)
    x = torch.ones(20, 40)
    x[0, 5], x[0, 6] = math.nan, math.inf
    for tokens in (1, 20):
        y = csr_linear_int8(x[:tokens], *quantize_rows(values, crow), crow, col)[0]
        assert math.isnan(y[0]) and y[1] == math.inf and y[2] == 0


@native
def test_messages():
    values, scales, crow, col = parts(4, 6, 0.3)
    x = torch.randn(3, 6)

    def refuses(message, *arguments):
        with pytest.raises(RuntimeError, match=f"csr_linear_int8: expected {message}"):
            csr_linear_int8(*arguments)

    refuses("x of dtype float32 or bfloat16, got float64", x.double(), values, scales, crow, col)
    refuses(
        r"x of shape \(..., in_features\), got a sc", torch.tensor(1.0), values, scales, crow, col
    )
    refuses("values of dtype int8, got float32", x, values.float(), scales, crow, col)
    refuses("values with 1 dimensions", x, values[None], scales, crow, col)
    refuses("scales of dtype float32, got float64", x, values, scales.double(), crow, col)
    refuses("scales with 1 dimensions", x, values, scales[None], crow, col)
    refuses(r"scales.size\(0\) = out_features = 4, got 3", x, values, scales[:3], crow, col)
    bias, other = torch.zeros(5), csr_plan(*parts(9, 6, 0.3)[2:], 6)
    refuses(r"bias.size\(0\) = out_features = 4, got 5", x, values, scales, crow, col, bias)
    refuses("bias of dtype", x, values, scales, crow, col, bias.double())
    refuses("plan made by csr_plan", x, values, scales, crow, col, None, other)
    refuses("activation to be none", x, values, scales, crow, col, None, None, "swish")
    refuses("col to rise strictly", x[:, :2].contiguous(), values, scales, crow, col)


def test_weight_messages():
    values, scales, crow, col = parts(4, 6, 0.3)
    with pytest.raises(ValueError, match=r"the weight of a linear layer \(out, in\), got"):
        sk.Int8CSRWeight(values, scales, crow, col, (4, 2, 3, 1))
    with pytest.raises(ValueError, match=r"scales \(4,\) of float32, got torch.float32 \(3,\)"):
        sk.Int8CSRWeight(values, scales[:3], crow, col, (4, 6))
    with pytest.raises(ValueError, match="columns"):
        sk.Int8CSRWeight(values, scales, crow, col + 9, (4, 6))


@pytest.mark.parametrize(
    ("part", "broken", "message"),
    [
        ("values", lambda t: t.float(), "expected values of int8"),
        ("scales", lambda t: t.double(), r"scales \(48,\) of float32"),
        ("scales", lambda t: t[1:].clone(), r"scales \(48,\) of float32"),
        ("scales", lambda t: t * math.nan, "scales above 0"),
        ("scales", lambda t: -t, "scales above 0"),
        ("values", lambda t: t[1:].clone(), "like values"),
    ],
)
def test_hostile_files_are_refused(tmp_path, part, broken, message):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    made, path = layer(), tmp_path / "m.safetensors"
    sk.save(made, path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors[f"weight.{part}"] = broken(tensors[f"weight.{part}"])
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=message):
        sk.load(made, path)
