"""int8 values with a scale per output in dense blocks: the op, the weight, the layer, files."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_blocks
from torch import nn

import sparsekern as sk
from sparsekern._load import _C
from sparsekern.measure.memory import weight_bytes
from sparsekern.ops.block import block_plan, blocks_to_dense
from sparsekern.ops.block_int8 import _reference, block_linear_int8, dequantize_blocks
from sparsekern.weights_int8 import quantize_blocks

native = pytest.mark.skipif(_C is None, reason="tests the messages of the compiled ops")
BLOCKS = [(16, 16), (4, 4), (32, 32), (1, 8), (16, 1), (5, 3)]


def parts(rows=40, cols=51, block=(4, 4), sparsity=0.5):
    """Quantized values, scales, crow, col of a random block matrix."""
    values, crow, col = random_blocks(rows, cols, block, sparsity)
    return *quantize_blocks(values.float(), crow, rows), crow, col


def exact(x, w, rows, bias=None):
    """In float64, from the stored int8 values."""
    values, scales, crow, col = w
    dense = blocks_to_dense("test", values.double(), crow, col, rows, x.shape[-1]).squeeze(2)
    bias = None if bias is None else bias.double()
    return nn.functional.linear(x.double(), dense * scales.double()[:, None], bias)


def layer(activation="none", pattern="block:16x16", bias=True):
    made = sk.SparseLinear(
        64, 48, bias, sparsity=0.5, pattern=pattern, format="block", activation=activation
    )
    sk.quantize(made)
    return made.eval()


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 17, 130, (2, 3, 5)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("planned", [True, False], ids=["plan", "noplan"])
def test_matches_float64(tokens, block, planned, isa):
    shape = tokens if isinstance(tokens, tuple) else (tokens,)
    rows, cols = 83, 70
    w = parts(rows, cols, block)
    x, bias = torch.randn(*shape, cols), torch.randn(rows)
    plan = block_plan(w[2], w[3], rows, cols, *block) if planned else None
    y = block_linear_int8(x, *w, bias, plan, rows)
    assert y.dtype == torch.float32 and y.shape == (*shape, rows)
    torch.testing.assert_close(y.double(), exact(x, w, rows, bias), rtol=1e-5, atol=1e-4)
    low = block_linear_int8(x.bfloat16(), *w, bias, plan, rows)
    assert low.dtype == torch.bfloat16
    want = exact(x.bfloat16(), w, rows, bias)
    torch.testing.assert_close(low.double(), want, rtol=2**-8, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(0, 140),
    cols=st.integers(1, 1100),
    rows=st.integers(1, 150),
    block=st.sampled_from(BLOCKS),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_property(tokens, cols, rows, block, sparsity):
    w, x = parts(rows, cols, block, sparsity), torch.randn(tokens, cols)
    got = block_linear_int8(x, *w, None, None, rows)
    torch.testing.assert_close(got.double(), exact(x, w, rows), rtol=1e-5, atol=1e-3)


def test_more_rows_than_are_kept_at_once(isa):
    """Several panels of columns and several groups of rows share one buffer of spread values."""
    w, x = parts(1100, 2100, (32, 32), 0.8), torch.randn(70, 2100)
    got = block_linear_int8(x, *w, torch.randn(1100) * 0, None, 1100)
    torch.testing.assert_close(got.double(), exact(x, w, 1100), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("act", ["none", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_reference_and_activations(act, tokens, isa):
    w, x, bias = parts(), torch.randn(tokens, 51), torch.randn(40)
    torch.testing.assert_close(
        block_linear_int8(x, *w, bias, None, 40, act), _reference(x, *w, bias, None, 40, act)
    )


def test_opcheck_and_compile():
    w, x = parts(), torch.randn(20, 51)
    plan = block_plan(w[2], w[3], 40, 51, 4, 4)
    torch.library.opcheck(block_linear_int8, (x, *w, torch.randn(40), plan, 40))
    torch.library.opcheck(block_linear_int8, (x.requires_grad_(), *w, None, None, 40, "gelu"))
    made = layer("gelu")
    compiled = torch.compile(made, fullgraph=True, dynamic=True)
    for tokens in (20, 5, 1):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x), made(x))


def test_quantization_rounds_to_the_nearest_of_255_levels():
    values, crow, _ = random_blocks(30, 80, (4, 8), 0.5)
    q, scales = quantize_blocks(values.float(), crow, 30)
    row = torch.repeat_interleave(torch.arange(crow.numel() - 1), crow.diff().long())
    row = (row[:, None] * 4 + torch.arange(4)).clamp(max=29)
    error = (dequantize_blocks(q, scales, crow) - values.float()).abs().amax(2)
    assert scales.shape == (30,) and torch.all(error <= 0.5001 * scales[row]) and q.min() >= -127
    largest = torch.zeros(30, dtype=torch.int32)
    largest = largest.scatter_reduce(0, row.flatten(), q.int().abs().amax(2).flatten(), "amax")
    assert set(largest.tolist()) <= {0, 127}  # 0 where a row has no block


def test_values_beyond_the_matrix_set_no_scale():
    """Blocks that leave the matrix may hold anything there: it is never read."""
    wide = sk.BlockWeight.from_dense(torch.randn(6, 6), pattern="block:4x4")
    want = sk.Int8BlockWeight.from_weight(wide)
    values = wide.values.detach().clone()
    values[1, :, 2:] = 1e9  # columns 6 and 7
    values[2, 2:] = math.nan  # rows 6 and 7
    other = sk.BlockWeight(values, *wide.indices(), wide.shape, wide.pattern)
    made = sk.Int8BlockWeight.from_weight(other)
    assert torch.equal(made.scales, want.scales) and torch.equal(made.values, want.values)


def test_quantize_reports_bytes_and_errors():
    blocks = {"sparsity": 0.5, "pattern": "block:16x16"}
    model = nn.Sequential(
        sk.SparseLinear(64, 96, activation="relu", **blocks), sk.SparseLinear(96, 40, sparsity=0.5)
    ).eval()
    before, x = copy.deepcopy(model), torch.randn(30, 64)
    report = sk.quantize(model, x)
    assert [type(m.weight) for m in model] == [sk.Int8BlockWeight, sk.Int8CSRWeight]
    for row in report.layers:
        assert 0 < row.error < 0.01
        assert row.bytes_after == row.bytes_before // 4 + 4 * row.shape[0]
    change = (model(x) - before(x)).norm() / before(x).norm()
    assert 0 < change < 0.02
    assert weight_bytes(model[0].weight) < 0.3 * weight_bytes(before[0].weight)
    assert "Int8BlockWeight((96, 64)" in repr(model[0])
    with pytest.raises(ValueError, match="its values are int8 already"):
        sk.quantize(model)
    broken = sk.SparseLinear(32, 32, **blocks)
    broken.weight.values.data[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="expected finite weights, got NaN or infinity"):
        sk.quantize(broken)


def test_copies_and_state_dict():
    made, x = layer("relu"), torch.randn(9, 64)
    want = made(x)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = layer("relu")
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), other):
        assert torch.equal(twin(x), want)
    names = {"values", "scales", "block_crow", "block_col", "needs_sk_load_or_sk_to_dense"}
    assert set(made.state_dict()) == {"bias", *(f"weight.{name}" for name in names)}
    for part, broken, message in (
        ("values", lambda t: t.float(), r"expected values of int8, got torch\.float32"),
        ("values", lambda t: t[:, 0], r"expected values \(n_blocks, R, C\), got shape"),
        ("scales", lambda t: -t, "expected scales above 0, got others"),
        ("scales", lambda t: t[1:], r"expected scales \(48,\) of float32"),
        ("block_col", lambda t: t + 4, r"expected columns in \[0, 4\)"),
    ):
        bad = made.state_dict()
        bad[f"weight.{part}"] = broken(bad[f"weight.{part}"])
        with pytest.raises(RuntimeError, match=message):
            made.load_state_dict(bad)
    assert torch.equal(made(x), want)


@pytest.mark.parametrize("pattern", ["block:16x16", "vector:4x1", "block:7x5"])
def test_saved_and_loaded_into_every_kind(tmp_path, pattern):
    made, x = layer(pattern=pattern), torch.randn(9, 64)
    path = sk.save(made, tmp_path / "m.safetensors")
    twin, floating = layer(pattern=pattern), sk.SparseLinear(64, 48, sparsity=0.2)
    sk.load(twin, path)
    assert torch.equal(twin(x), made(x)) and twin.weight.pattern == pattern
    blocks = sk.SparseLinear(64, 48, sparsity=0.2, pattern=pattern, format="block")
    dense = nn.Linear(64, 48)
    for target in (floating, blocks, dense):
        sk.load(target, path)
        torch.testing.assert_close(target(x), made(x))
    wide = sk.SparseLinear(64, 48, sparsity=0.5, pattern=pattern, format="block").eval()
    sk.load(twin, sk.save(wide, path))  # quantized on the way in, at the positions of the file
    assert twin.weight.block_col.tolist() == wide.weight.block_col.tolist()
    torch.testing.assert_close(twin(x), wide(x), rtol=0.02, atol=0.02)


def test_hostile_files_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    made, path = layer(), tmp_path / "m.safetensors"
    sk.save(made, path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    good = load_file(path)
    for part, broken, message in (
        ("values", lambda t: t.float(), "expected values of int8"),
        ("scales", lambda t: t * math.nan, "scales above 0"),
        ("scales", lambda t: t.double(), r"scales \(48,\) of float32"),
        ("block_crow", lambda t: t[1:].clone(), r"crow of 4 entries"),
        ("block_col", lambda t: t * 0 - 1, "columns in"),
    ):
        bad = {**good, f"weight.{part}": broken(good[f"weight.{part}"])}
        save_file(bad, path, metadata=header)
        with pytest.raises(ValueError, match=message):
            sk.load(made, path)


@pytest.mark.parametrize("tokens", [1, 20])
def test_nan_and_inf_stay_in_their_columns(tokens, isa):
    weight = torch.zeros(20, 80)
    weight[:16, 32:48] = 1.0
    made = sk.Int8BlockWeight.from_dense(weight, None, "block:16x16")
    x = torch.ones(tokens, 80)
    x[0, 79], x[0, 32] = math.nan, math.inf
    y = made.eval().linear(x, None, "none")[0]
    assert bool((y[:16] == math.inf).all()) and bool((y[16:] == 0).all())


@native
def test_messages():
    values, scales, crow, col = parts(8, 6)
    x = torch.randn(3, 6)

    def refuses(message, *arguments):
        with pytest.raises(RuntimeError, match=f"block_linear_int8: expected {message}"):
            block_linear_int8(*arguments)

    none = (None, None, 8)
    w = (values, scales, crow, col)
    refuses("x of dtype float32 or bfloat16, got float64", x.double(), *w, *none)
    refuses(r"x of shape \(..., in_features\), got a scalar", torch.tensor(1.0), *w, *none)
    refuses("values of dtype int8, got float32", x, values.float(), *w[1:], *none)
    refuses("values with 3 dimensions", x, values[0], *w[1:], *none)
    refuses(r"values.size\(0\) = col.size\(0\)", x, values[1:], *w[1:], *none)
    refuses("scales of dtype float32, got float64", x, values, scales.double(), crow, col, *none)
    refuses("scales with 1 dimensions", x, values, scales[None], crow, col, *none)
    refuses(r"scales.size\(0\) = out_features = 8, got 7", x, values, scales[:7], crow, col, *none)
    refuses(r"bias.size\(0\) = out_features = 8, got 5", x, *w, torch.zeros(5), None, 8)
    refuses("bias of dtype", x, *w, torch.zeros(8).double(), None, 8)
    other = block_plan(crow, col, 7, 6, 4, 4)
    refuses("plan made by block_plan for this pattern", x, *w, None, other, 8)
    refuses("activation to be none", x, *w, *none, "swish")
    refuses("col to rise strictly", x[:, :1].contiguous(), values, scales, crow, col + 1, *none)


def test_weight_messages():
    w = parts(4, 6)
    with pytest.raises(ValueError, match=r"Int8BlockWeight: expected the weight of a linear layer"):
        sk.Int8BlockWeight(*w, (4, 2, 3, 1), "block:4x4")
    with pytest.raises(ValueError, match=r"Int8BlockWeight: .*columns"):
        sk.Int8BlockWeight(*w[:3], w[3] + 9, (4, 6), "block:4x4")
