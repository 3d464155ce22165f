"""Pruned models without sparse layers: their files are small, and torch.nn.utils.prune's load."""

import itertools
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekern as sk


def bits(tensor):
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}
    return tensor.detach().contiguous().view(whole[tensor.itemsize])


def holder(tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return module


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 48), (16, 8, 3, 3), (24, 7, 9), (130, 1000)])
@pytest.mark.parametrize(("sparsity", "signs"), [(0.9, 0.0), (0.6, 0.5), (0.995, 0.3)])
def test_every_bit_comes_back(tmp_path, dtype, shape, sparsity, signs):
    weight = torch.randn(shape)
    weight[torch.rand(shape) < sparsity] = 0.0
    weight[(weight == 0) & (torch.rand(shape) < signs)] = -0.0
    weight.view(-1)[:2] = torch.tensor([float("nan"), 1e-40])
    model = holder(weight.to(dtype))
    path = sk.save(model, tmp_path / "m")
    other = holder(torch.ones(shape).to(dtype))
    assert sk.load(other, path) == ([], [])
    assert torch.equal(bits(other.weight), bits(model.weight))
    if shape == (130, 1000):
        density, mask = 1 - sparsity, (1 + (signs > 0 or dtype.itemsize == 1)) / 8
        most = weight.numel() * (1.2 * density * dtype.itemsize + mask)
        assert os.path.getsize(path) < most + 2000


def test_sizes_of_a_pruned_model(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    dense = os.path.getsize(sk.save(model, tmp_path / "dense"))
    assert load_file(tmp_path / "dense").keys() == dict(model.named_parameters()).keys()
    sk.prune(model, sparsity=0.9)
    path = sk.save(model, tmp_path / "pruned")
    assert os.path.getsize(path) < 0.15 * dense
    other, x = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), torch.randn(3, 256)
    sk.load(other, path)
    assert type(other[0]) is nn.Linear and torch.equal(other(x), model(x))
    sparse = sk.convert_to_sparse(model, cache=False)
    values = [layer.weight.values.clone() for layer in sparse]
    for layer in sparse:
        layer.weight.values.data.zero_()
    sk.load(sparse, path)
    assert all(torch.equal(v, la.weight.values) for v, la in zip(values, sparse, strict=True))


def torch_pruned(fill=0.9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(2, 4, 3))
    torch_prune.l1_unstructured(model[0], "weight", fill)
    torch_prune.ln_structured(model[1], "weight", 0.5, n=1, dim=0)
    torch_prune.random_unstructured(model[1], "bias", 0.5)
    return model


@pytest.mark.parametrize("by", ["safetensors", "sk.save", "state_dict"])
def test_files_of_torch_prune(tmp_path, by):
    model, path = torch_pruned(), tmp_path / "m"
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if by == "state_dict":
        path = state
    elif by == "sk.save":
        sk.save(model, path)
    else:
        save_file(state, path)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(2, 4, 3))
    assert sk.load(dense, path) == ([], [])
    sparse = nn.Sequential(
        sk.SparseLinear.from_dense(dense[0]), sk.SparseConv2d.from_dense(dense[1])
    )
    with torch.no_grad():
        sparse[0].weight.values.zero_()
    sk.load(sparse, path)
    for layer, want in itertools.product((dense, sparse), [model]):
        for got, pruned in zip(layer, want, strict=True):
            weight = got.weight if isinstance(got.weight, torch.Tensor) else got.weight.to_dense()
            assert torch.equal(weight, pruned.weight.detach())
    assert torch.equal(bits(dense[1].bias), bits(model[1].bias))
    again = torch_pruned(0.5)  # one that is pruned itself keeps the two apart
    sk.load(again, path)
    assert torch.equal(again[0].weight_mask, model[0].weight_mask)


def test_a_mask_alone_and_one_of_another_shape(tmp_path):
    state = {k: v.contiguous() for k, v in torch_pruned().state_dict().items()}
    dense = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(2, 4, 3))
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    save_file({k: v for k, v in state.items() if k != "0.weight_mask"}, tmp_path / "m")
    with pytest.raises(RuntimeError, match=r"Missing key.*'0.weight'.*\n.*'0.weight_orig'"):
        sk.load(dense, tmp_path / "m")
    for bad in (torch.ones(1, 64), torch.ones(64, 64, dtype=torch.complex64)):
        save_file({**state, "0.weight_mask": bad}, tmp_path / "m")
        with pytest.raises(ValueError, match=r"load: .*/m .*'0.weight': expected 0.weight_orig"):
            sk.load(dense, tmp_path / "m")
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
