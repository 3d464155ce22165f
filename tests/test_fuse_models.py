"""What becomes of fused models: gradients, torch.compile, files, and models of transformers."""

import copy
import json

import pytest
import torch
from fuse_common import ConvNet, forced, fused, prepared
from torch import nn

import sparsekern as sk
from sparsekern.fuse import FusedActivation


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    forced(monkeypatch)


def test_gradients_flow_through_a_fused_model():
    model, x = prepared(ConvNet(), dtype=torch.float64), torch.randn(2, 3, 9, 9).double()
    x.requires_grad_()
    (want,) = torch.autograd.grad(model(x).sum(), x)
    sk.convert_to_sparse(model, x.detach())
    (got,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(got, want)


def test_compiles_whole():
    model, x = prepared(ConvNet()), torch.randn(2, 3, 9, 9)
    fused(model, x)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


def test_save_and_load(tmp_path):
    """Into the same model, a fresh one and a sparse one that is not fused."""
    x = torch.randn(2, 3, 9, 9)
    model, fresh, plain = (prepared(ConvNet()) for _ in range(3))
    twin = copy.deepcopy(model)
    fused(model, x)
    fused(twin, x)
    sk.convert_to_sparse(plain, x, fuse=False)
    path, want = sk.save(model, tmp_path / "model.safetensors"), model(x)
    for other in (twin, fresh, plain):
        sk.load(other, path)
        torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-5)
    dense = prepared(ConvNet())
    sk.load(dense, path, dense=True)
    torch.testing.assert_close(dense(x), want, rtol=1e-5, atol=1e-5)
    assert isinstance(fresh.na, nn.Identity) and isinstance(fresh.relu, FusedActivation)
    assert isinstance(dense.na, nn.Identity) and type(dense.relu) is nn.ReLU
    assert fresh.a.bias is not None


def test_a_load_that_fails_folds_nothing(tmp_path):
    x = torch.randn(2, 3, 9, 9)
    model, other = prepared(ConvNet()), prepared(ConvNet())
    fused(model, x)
    path = sk.save(model, tmp_path / "model.safetensors")
    other.fc = nn.Linear(8, 7)
    modules = list(other.modules())
    with pytest.raises(RuntimeError, match="size mismatch for fc"):
        sk.load(other, path)
    assert list(other.modules()) == modules and other.a.bias is None


def test_damaged_names_of_folded_normalisations(tmp_path):
    from safetensors.torch import save_file

    header = {"version": 1, "layers": {}, "aliases": {}, "folded": [3]}
    path = tmp_path / "bad.safetensors"
    save_file({"weight": torch.ones(1)}, path, metadata={"sparsekern": json.dumps(header)})
    with pytest.raises(ValueError, match="expected folded as a list of names, got \\[3\\]"):
        sk.load(nn.Linear(1, 1), path)


def test_resnet_and_bert_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=4
    )
    model = prepared(transformers.ResNetForImageClassification(config), dtype=torch.float64)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    want = model(x).logits
    report = sk.report(sk.convert_to_sparse(model, x))
    # The last activation of a block reads a sum, which a layer cannot compute.
    assert len(report.folded) == norms and len(report.fused) == 1 + 2 * 3
    torch.testing.assert_close(model(x).logits, want, rtol=1e-9, atol=1e-9)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2
    )
    model, ids = prepared(transformers.BertModel(config)), torch.arange(8)[None]
    want = model(ids)[0]
    report = sk.report(sk.convert_to_sparse(model, ids))
    assert report.fused == [f"encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)]
    torch.testing.assert_close(model(ids)[0], want)
