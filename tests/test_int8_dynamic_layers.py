"""Layers with int8 weights and activations: quantize, copies, files, reports."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.measure.energy_model import count_operations

BLOCKS = {"sparsity": 0.5, "pattern": "block:16x16", "format": "block"}


def layer(activation="none", pattern="block:16x16", activations="dynamic"):
    made = sk.SparseLinear(64, 48, activation=activation, **{**BLOCKS, "pattern": pattern})
    sk.quantize(made, activations=activations)
    return made.eval()


def test_quantize_reports_formats_and_errors():
    narrow = {**BLOCKS, "pattern": "vector:4x1"}
    model = nn.Sequential(
        sk.SparseLinear(64, 96, activation="relu", **BLOCKS),
        sk.SparseLinear(96, 40, sparsity=0.5),
        sk.SparseLinear(40, 32, **narrow),
    ).eval()
    before, x = copy.deepcopy(model), torch.randn(30, 64)
    report = sk.quantize(model, x, activations="dynamic")
    kinds = [sk.DynamicInt8BlockWeight, sk.Int8CSRWeight, sk.Int8BlockWeight]
    assert [type(m.weight) for m in model] == kinds
    assert [row.format for row in report.layers] == ["block_int8_dynamic", "csr_int8", "block_int8"]
    columns = "expected blocks of a multiple of 4 columns, got 1"
    assert report.weight_only == {"1": "no products of int8 for format csr", "2": columns}
    assert f"2: weight only, {columns}" in str(report)
    assert report.to_dict()["weight_only"] == report.weight_only
    weights = copy.deepcopy(before)
    alone = sk.quantize(weights, x)
    assert not alone.weight_only
    assert alone.layers[0].error < report.layers[0].error < 0.02
    change = (model(x) - before(x)).norm() / before(x).norm()
    assert 0 < change < 0.03
    formats = [row.format for row in sk.report(model).layers]
    assert formats == ["block_int8_dynamic", "csr_int8", "block_int8"]
    assert "DynamicInt8BlockWeight((96, 64)" in repr(model[0])
    with pytest.raises(ValueError, match="its values are int8 already"):
        sk.quantize(model, activations="dynamic")
    wrong = "quantize: expected activations to be 'float' or 'dynamic', got 'static'"
    with pytest.raises(ValueError, match=wrong):
        sk.quantize(before, activations="static")


def test_a_converted_model_says_so():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    sk.prune(model, method="magnitude", sparsity=0.75, pattern="block:16x16")
    model = sk.convert_to_sparse(model.eval())
    assert sk.report(model).layers[0].format == "block"
    sk.quantize(model, activations="dynamic")
    row = sk.report(model).layers[0]
    assert row.format == "block_int8_dynamic"
    assert row.reason.endswith("; int8 since, the times are those of float values")


def test_layers_that_share_a_weight_go_on_sharing_it():
    first = sk.SparseLinear(64, 64, **BLOCKS)
    second = sk.SparseLinear(64, 64, **BLOCKS)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    sk.quantize(model, activations="dynamic")
    assert model[0].weight is model[1].weight
    assert type(model[0].weight) is sk.DynamicInt8BlockWeight


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
    bad = made.state_dict()
    bad["weight.values"] = bad["weight.values"][:, :, :15]
    with pytest.raises(RuntimeError, match="expected blocks of a multiple of 4 columns, got 15"):
        made.load_state_dict(bad)
    assert torch.equal(made(x), want)


@pytest.mark.parametrize("pattern", ["block:16x16", "block:4x4", "vector:1x8"])
def test_saved_and_loaded_into_every_kind(tmp_path, pattern):
    made, x = layer(pattern=pattern), torch.randn(9, 64)
    path = sk.save(made, tmp_path / "m.safetensors")
    twin = layer(pattern=pattern)
    sk.load(twin, path)
    assert torch.equal(twin(x), made(x)) and twin.weight.pattern == pattern
    only = layer(pattern=pattern, activations="float")
    blocks = sk.SparseLinear(64, 48, **{**BLOCKS, "pattern": pattern})
    for target in (only, blocks, sk.SparseLinear(64, 48, sparsity=0.2), nn.Linear(64, 48)):
        sk.load(target, path)
        torch.testing.assert_close(target(x), made.to_dense()(x))
    sk.load(twin, sk.save(only, path))  # int8 values stay what they are
    assert torch.equal(twin.weight.values, only.weight.values)


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
        ("values", lambda t: t[:, :, :14].clone(), "multiple of 4 columns, got 14"),
        ("values", lambda t: t[0, 0, 0], "expected values .n_blocks, R, C., got"),
        ("block_col", lambda t: t * 0 - 1, "columns in"),
    ):
        bad = {**good, f"weight.{part}": broken(good[f"weight.{part}"])}
        save_file(bad, path, metadata=header)
        with pytest.raises(ValueError, match=message):
            sk.load(made, path)


def test_compiles_whole():
    made = layer("gelu")
    compiled = torch.compile(made, fullgraph=True, dynamic=True)
    for tokens in (20, 5, 1):
        x = torch.randn(tokens, 64)
        assert torch.equal(compiled(x), made(x))


def test_meta_device_and_back():
    made, x = layer(), torch.randn(3, 64)
    moved = copy.deepcopy(made).to("meta")
    assert moved(x.to("meta")).shape == (3, 48)
    moved.to_empty(device="cpu").load_state_dict(made.state_dict())
    assert torch.equal(moved(x), made(x))


def test_training_is_refused():
    made, name = layer(), "DynamicInt8BlockWeight"
    with pytest.raises(RuntimeError, match=f"{name}: expected a model in eval mode, got one in tr"):
        made.train()(torch.randn(3, 64))
    with pytest.raises(RuntimeError, match=f"{name}: expected inference, got a request to train"):
        made.prepare_training()


@pytest.mark.parametrize("act", ["none", "gelu"])
def test_gradients_pass_as_if_nothing_were_rounded(act):
    made = layer(act)
    twin = made.to_dense()
    x = torch.randn(20, 64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(a).sum().backward()
    twin(b).sum().backward()
    close = {} if act == "none" else {"rtol": 0.02, "atol": 0.02}  # gelu' at the rounded sums
    torch.testing.assert_close(a.grad, b.grad, **close)
    bias = (twin if act == "none" else twin[0]).bias
    torch.testing.assert_close(made.bias.grad, bias.grad, **close)


def test_dtypes_and_back_to_dense():
    made, x = layer("gelu"), torch.randn(9, 64)
    want = made(x)
    torch.testing.assert_close(made.to_dense()(x), want, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x.bfloat16()).dtype == torch.bfloat16
    scales = made.weight.scales.clone()
    low = copy.deepcopy(made).to(torch.bfloat16)
    assert torch.equal(low.weight.scales, scales) and low.weight.dtype == torch.int8
    torch.testing.assert_close(low(x.bfloat16()).float(), want, rtol=0.02, atol=0.03)


def test_energy_model_counts_int8_products():
    made = layer()
    (row,) = count_operations(made, torch.randn(9, 64)).layers
    assert row.dtype == torch.int8 and row.macs == 9 * made.weight.values.numel()
    assert row.weight_bytes == made.weight.values.numel() + 4 * 48 + 4 * 48


def test_weight_messages():
    narrow = layer(pattern="block:7x5", activations="float").weight
    arguments = (narrow.values, narrow.scales, *narrow.indices(), narrow.shape, narrow.pattern)
    message = "DynamicInt8BlockWeight: expected blocks of a multiple of 4 columns, got 5"
    with pytest.raises(ValueError, match=message):
        sk.DynamicInt8BlockWeight(*arguments)
    wide = (torch.zeros(0, 4, 4).char(), torch.ones(4), torch.zeros(2).int(), torch.zeros(0).int())
    message = "DynamicInt8BlockWeight: expected at most 132104 in_features, got 132108"
    with pytest.raises(ValueError, match=message):
        sk.DynamicInt8BlockWeight(*wide, (4, 132108), "block:4x4")
