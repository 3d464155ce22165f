"""save and load: round trips, ties, mixing sparse and dense."""

import copy
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.storage import load, save
from sparsekern.storage_codec import column_dtype
from sparsekern.weights import CSRWeight


def sparse_net(sparsity=0.9, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        SparseConv2d(3, 8, 3, sparsity=sparsity),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        SparseLinear(8 * 36, 64, sparsity=sparsity),
        SparseLinear(64, 10, sparsity=0.5, pattern="2:4"),
    ).eval()


def dense_net() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 64)
    return nn.Sequential(*layers, nn.Linear(64, 10)).eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


# Round trips


def test_round_trip_takes_over_another_pattern(tmp_path):
    model, other = sparse_net(0.9, seed=0), sparse_net(0.7, seed=1)
    other[4].weight.pattern = "unstructured"
    assert save(model, tmp_path / "m.safetensors") == tmp_path / "m.safetensors"
    assert load(other, tmp_path / "m.safetensors") == ([], [])
    assert same_state(model, other) and other[4].weight.pattern == "2:4"
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), other(x))  # the kernel schedules were made anew


FORMATS = {"csr": "unstructured", "block": "block:4x4", "nm": "2:4"}


def layer_of(format: str) -> SparseLinear:
    sparsity = None if format == "nm" else 0.5
    layer = SparseLinear(40, 30, pattern=FORMATS[format], sparsity=sparsity)
    assert layer.weight.format == format
    return layer


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_survives(tmp_path, format):
    model, other = layer_of(format), layer_of(format)
    save(model, tmp_path / "m")
    load(other, tmp_path / "m")
    assert same_state(model, other) and other.weight.pattern == FORMATS[format]
    dense = nn.Linear(40, 30)
    load(dense, tmp_path / "m")
    assert torch.equal(dense.weight, model.to_dense().weight)
    save(dense, tmp_path / "dense")
    nn.init.zeros_(other.weight.values)
    load(other, tmp_path / "dense")
    assert same_state(model, other)
    assert (tmp_path / "m").stat().st_size < 4 * 40 * 30


@pytest.mark.parametrize(("there", "here"), [("nm", "csr"), ("block", "csr"), ("nm", "block")])
def test_formats_meet(tmp_path, there, here):
    model, other = layer_of(there), layer_of(here)
    save(model, tmp_path / "m")
    load(other, tmp_path / "m")
    assert torch.equal(other.to_dense().weight, model.to_dense().weight)
    x = torch.randn(3, 40)
    torch.testing.assert_close(other(x), model(x))


def test_a_format_that_cannot_hold_the_weight(tmp_path):
    save(layer_of("csr"), tmp_path / "m")
    other = layer_of("nm")
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"load: .*/m: expected a weight 'weight' that fits format nm"
    ):
        load(other, tmp_path / "m")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_survive(tmp_path, dtype):
    model = SparseLinear(40, 30, sparsity=0.8, dtype=torch.float32).to(dtype)
    fresh = SparseLinear(40, 30, sparsity=0.8, dtype=torch.float32).to(dtype)
    save(model, tmp_path / "m")
    load(fresh, tmp_path / "m")
    assert same_state(model, fresh) and fresh.weight.values.dtype == dtype
    wide = SparseLinear(40, 30, sparsity=0.8, dtype=torch.float64)
    load(wide, tmp_path / "m")
    assert wide.weight.values.dtype == torch.float64
    assert torch.equal(wide.weight.values, model.weight.values.double())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.one_of(st.integers(1, 40), st.integers(250, 300)),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_any_pattern_survives(rows, cols, density, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, cols, generator=generator)
    mask = torch.rand(rows, cols, generator=generator) < density
    dense[mask & (torch.rand(rows, cols, generator=generator) < 0.1)] = 0  # stored zeros
    weight = CSRWeight.from_dense(dense, mask)
    fresh = CSRWeight.from_dense(torch.zeros(rows, cols))
    with tempfile.TemporaryDirectory() as folder:
        save(weight, Path(folder) / "w")
        load(fresh, Path(folder) / "w")
    assert same_state(weight, fresh)


def test_the_smaller_code_is_chosen(tmp_path):
    encodings = {}
    for sparsity in (0.5, 0.9, 0.99):
        model = SparseLinear(512, 256, sparsity=sparsity)
        save(model, tmp_path / "m")
        with safe_open(tmp_path / "m", framework="pt") as file:
            header = json.loads(file.metadata()["sparsekern"])
        encodings[sparsity] = header["layers"]["weight"]["encoding"]
        values = 4 * model.weight.nnz
        least = min(512 * 256 // 8, 2 * model.weight.nnz + 4 * 257)
        assert os.path.getsize(tmp_path / "m") - values - least < 1800  # bias and header
    assert encodings == {0.5: "mask", 0.9: "mask", 0.99: "csr"}


@pytest.mark.parametrize(
    ("cols", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.uint16),
        (65536, torch.uint16),
        (65537, torch.int32),
    ],
)
def test_columns_are_narrow(tmp_path, cols, dtype):
    assert column_dtype(cols) == dtype
    weight = torch.zeros(64, cols)
    weight[5, cols - 1], weight[7, 0] = 1.0, 2.0
    model = CSRWeight.from_dense(weight)
    save(model, tmp_path / "m")
    assert load_file(tmp_path / "m")["col"].dtype == dtype
    fresh = CSRWeight.from_dense(torch.zeros(64, cols))
    load(fresh, tmp_path / "m")
    assert torch.equal(fresh.to_dense(), weight)


def test_smaller_than_dense(tmp_path):
    model, dense = SparseLinear(256, 256, sparsity=0.5), nn.Linear(256, 256)
    save(model, tmp_path / "sparse")
    save(dense, tmp_path / "dense")
    ratio = os.path.getsize(tmp_path / "dense") / os.path.getsize(tmp_path / "sparse")
    assert ratio > 1.85


def test_views_and_non_contiguous_tensors(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.arange(12.0).view(3, 4)
            self.register_buffer("columns", base.t())
            self.register_buffer("row", base[1])
            self.register_buffer("scalar", torch.tensor(3))
            self.register_buffer("empty", torch.zeros(0, 2))

    model, fresh = Views(), Views()
    fresh.columns.zero_()
    save(model, tmp_path / "m")
    load(fresh, tmp_path / "m")
    assert same_state(model, fresh)


# Ties


class Tied(nn.Module):
    def __init__(self, tie: bool, sparse: bool):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        make = (lambda: SparseLinear(16, 16, sparsity=0.5)) if sparse else lambda: nn.Linear(16, 16)
        self.a, self.b = make(), make()
        if tie:
            self.head.weight = self.embed.weight
            self.b.weight = self.a.weight


@pytest.mark.parametrize("sparse_target", [True, False])
def test_ties_are_stored_once_and_tied_again(tmp_path, sparse_target):
    model, fresh = Tied(True, True), Tied(False, sparse_target)
    save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m")
    assert "head.weight" not in stored and not any(k.startswith("b.weight") for k in stored)
    load(fresh, tmp_path / "m", dense=True)
    assert fresh.head.weight is fresh.embed.weight and fresh.b.weight is fresh.a.weight
    assert torch.equal(fresh.embed.weight, model.embed.weight)
    weight = fresh.a.weight.to_dense() if sparse_target else fresh.a.weight
    assert torch.equal(weight, model.a.weight.to_dense())


def test_shared_modules(tmp_path):
    layer = SparseLinear(8, 8, sparsity=0.5)
    save(nn.Sequential(layer, layer), tmp_path / "m")
    other = SparseLinear(8, 8, sparsity=0.5)
    model = nn.Sequential(other, other)
    load(model, tmp_path / "m")
    assert same_state(layer, other) and model[0] is model[1]


def test_a_tied_model_refuses_two_contents(tmp_path):
    save(Tied(False, True), tmp_path / "m")
    model = Tied(True, True)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"one content for 'embed.weight' and 'head.weight'"):
        load(model, tmp_path / "m")
    assert same_state(model, before)


# Sparse meets dense


def test_sparse_file_into_dense_model(tmp_path):
    model, dense = sparse_net(), dense_net()
    save(model, tmp_path / "m")
    load(dense, tmp_path / "m", dense=True)
    assert torch.equal(dense[3].weight, model[3].weight.to_dense())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(dense(x), model(x))


def test_dense_file_into_sparse_model(tmp_path):
    model, dense = sparse_net(), dense_net()
    save(model, tmp_path / "sparse")
    load(dense, tmp_path / "sparse", dense=True)
    save_file(dense.state_dict(), tmp_path / "dense")  # any safetensors file will do
    for layer in (model[0], model[3], model[4]):
        layer.weight.values.data.zero_()
    load(model, tmp_path / "dense")
    assert torch.equal(model[3].weight.to_dense(), dense[3].weight)


def test_dense_file_with_nonzeros_outside_the_pattern(tmp_path):
    model = SparseLinear(8, 4, sparsity=0.5)
    save_file(nn.Linear(8, 4).state_dict(), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"'weight' to be zero outside .* got 16 nonzeros"):
        load(model, tmp_path / "dense")


def test_transposed_linear_of_transformers(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    dense = conv1d(12, 8)  # weight (8, 12)
    dense.weight.data[torch.rand(8, 12) < 0.5] = 0
    sparse = SparseLinear.from_dense(dense)
    save(sparse, tmp_path / "sparse")
    fresh = conv1d(12, 8)
    load(fresh, tmp_path / "sparse")
    assert torch.equal(fresh.weight, dense.weight)
    save(dense, tmp_path / "dense")
    sparse.weight.values.data.zero_()
    load(sparse, tmp_path / "dense")
    assert torch.equal(sparse.weight.to_dense(), dense.weight.t())


# Names and shapes


def test_missing_and_unexpected_names(tmp_path):
    save(nn.Sequential(SparseLinear(8, 8, sparsity=0.5, bias=False)), tmp_path / "m")
    model = nn.Sequential(SparseLinear(8, 8, sparsity=0.5), nn.Linear(8, 2))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\): '0.bias', '1.weight', '1.bias'"):
        load(model, tmp_path / "m")
    result = load(model, tmp_path / "m", strict=False)
    assert result.missing_keys == ["0.bias", "1.weight", "1.bias"]
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\): '0.weight'"):
        load(nn.Sequential(), tmp_path / "m")
    assert load(nn.Sequential(), tmp_path / "m", strict=False).unexpected_keys == ["0.weight"]


@pytest.mark.parametrize("target", [SparseLinear(9, 8, sparsity=0.5), nn.Linear(9, 8)])
@pytest.mark.parametrize("source", [SparseLinear(8, 8, sparsity=0.5), nn.Linear(8, 8)])
def test_wrong_shapes(tmp_path, source, target):
    save(source, tmp_path / "m")
    before = copy.deepcopy(target)
    message = r"size mismatch for weight: \(8, 8\) in the file, \(8, 9\) in the model"
    with pytest.raises(RuntimeError, match=message):
        load(target, tmp_path / "m", strict=False)
    assert same_state(target, before)


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"save: expected a torch.nn.Module, got dict"):
        save({}, tmp_path / "m")
    with pytest.raises(TypeError, match=r"load: expected a torch.nn.Module, got dict"):
        load({}, tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="expected a file, got"):
        load(nn.Linear(2, 2), tmp_path / "none")
    with pytest.raises(ValueError, match=r"save: expected 'weight' .* meta device"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "m")
    with pytest.raises(TypeError, match=r"load: expected a path or a state_dict, got int"):
        load(nn.Linear(2, 2), 3)


class Odd(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_state_that_is_no_tensor(tmp_path):
    with pytest.raises(TypeError, match=r"save: expected '_extra_state' .* got dict"):
        save(Odd({}), tmp_path / "m")
    with pytest.raises(TypeError, match=r"save: .* got torch.sparse_coo"):
        save(Odd(torch.eye(2).to_sparse()), tmp_path / "m")
    save(nn.Sequential(), tmp_path / "m")
    with pytest.raises(TypeError, match=r"load: .*/m: expected '_extra_state' .* got dict"):
        load(Odd({}), tmp_path / "m", strict=False)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_cuda_to_cpu_and_back(tmp_path):
    model, fresh = sparse_net().cuda(), sparse_net(0.7)
    save(model, tmp_path / "m")
    load(fresh, tmp_path / "m")
    assert same_state(fresh, model.cpu())
    model = sparse_net(0.7).cuda()
    load(model, tmp_path / "m")
    assert model[3].weight.values.is_cuda and same_state(model.cpu(), fresh)
