"""load builds the sparse layers of a file: in fresh models, on the meta device."""

import json

import pytest
import torch
from fuse_common import ConvNet, forced, fused, prepared
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekern as sk
from sparsekern.fuse import FusedActivation


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()


def converted(pattern="unstructured", sparsity=0.9) -> nn.Sequential:
    torch.manual_seed(0)
    model = mlp()
    sk.prune(model, sparsity=None if ":" in pattern and "x" not in pattern else sparsity,
             pattern=pattern, scope="uniform")  # fmt: skip
    for name in ("0", "2"):
        model._modules[name] = sk.SparseLinear.from_dense(model._modules[name])
    return model.eval()


def on_meta(make):
    with torch.device("meta"):
        return make().eval()


def names(model) -> list[str]:
    return [type(layer).__name__ for layer in model]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("where", ["fresh", "meta"])
def test_layers_are_built_as_in_the_file(tmp_path, pattern, where):
    model, x = converted(pattern), torch.randn(5, 64)
    path = sk.save(model, tmp_path / "m")
    other = mlp() if where == "fresh" else on_meta(mlp)
    assert sk.load(other, path) == ([], [])
    assert names(other) == ["SparseLinear", "GELU", "SparseLinear"]
    assert other[0].weight.format == model[0].weight.format
    assert other[0].pattern == model[0].pattern and other[0].weight.values.requires_grad
    assert torch.equal(other(x), model(x))
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    assert sk.report(other).n_sparse == 2
    path.write_bytes(b"")  # the model has memory of its own
    assert torch.equal(other(x), model(x))


def test_dense_keeps_layers_dense(tmp_path):
    model, x = converted(), torch.randn(5, 64)
    path = sk.save(model, tmp_path / "m")
    for other in (mlp(), on_meta(mlp)):
        sk.load(other, path, dense=True)
        assert names(other) == ["Linear", "GELU", "Linear"]
        assert torch.equal(other[0].weight, model[0].weight.to_dense())
        torch.testing.assert_close(other(x), model(x))


def test_quantized_layers_and_other_dtypes(tmp_path):
    model, x = converted("block:4x4"), torch.randn(5, 64)
    sk.quantize(model)
    path = sk.save(model, tmp_path / "m")
    other = on_meta(mlp)
    sk.load(other, path)
    assert other[0].weight.values.dtype == torch.int8 and torch.equal(other(x), model(x))
    low = on_meta(lambda: mlp().to(torch.bfloat16))
    sk.load(low, sk.save(converted(), path))
    assert low[0].weight.dtype == low[0].bias.dtype == torch.bfloat16


def test_sparse_layers_on_meta(tmp_path):
    model, x = converted(), torch.randn(5, 64)
    path = sk.save(model, tmp_path / "m")
    with torch.device("meta"):
        other = nn.Sequential(
            sk.SparseLinear(64, 96, sparsity=0.5), nn.GELU(), sk.SparseLinear(96, 64, sparsity=0.5)
        )
    sk.load(other.eval(), path)
    assert torch.equal(other(x), model(x))
    sk.load(other, sk.save(sk.to_dense(model), path))  # now it has positions
    with torch.device("meta"):
        blank = sk.SparseLinear(64, 96, sparsity=0.5)
    with pytest.raises(ValueError, match=r"load: .*'weight' .*no positions to read it at"):
        sk.load(blank, sk.save(model[0], path))
    assert blank.weight.values.is_meta


def test_shared_and_tied_layers(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.again = self.a
            self.embed, self.head = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
            self.b.weight, self.head.weight = self.a.weight, self.embed.weight

        def forward(self, x):
            return self.head(self.again(self.b(self.a(x))))

    model, x = Tied(), torch.randn(4, 32)
    sparse = sk.SparseLinear.from_dense(model.a, sparsity=0.8, pattern="unstructured")
    b = sk.SparseLinear.from_weight(sparse.weight, model.b)
    model.a = model.again = sparse
    model.b = b
    path = sk.save(model, tmp_path / "m")
    for other in (Tied(), on_meta(Tied)):
        sk.load(other, path)
        assert other.a is other.again and other.a.weight is other.b.weight
        assert other.head.weight is other.embed.weight
        assert torch.equal(other(x), model(x))


def test_fused_and_folded_models(tmp_path, monkeypatch):
    forced(monkeypatch)
    x = torch.randn(2, 3, 9, 9)
    model = prepared(ConvNet())
    fused(model, x)
    path = sk.save(model, tmp_path / "m")
    with torch.device("meta"):
        other = ConvNet().eval()
    sk.load(other, path)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    assert isinstance(other.relu, FusedActivation) and other.a.activation == "relu"
    assert not isinstance(other.last, FusedActivation) or model.last is not other.last
    dense = sk.to_dense(other)
    assert type(dense.relu) is nn.ReLU and type(dense.a) is nn.Conv2d
    torch.testing.assert_close(dense(x), model(x), rtol=1e-5, atol=1e-5)


def test_an_activation_of_another_kind_is_not_fused(tmp_path, monkeypatch):
    forced(monkeypatch)
    x = torch.randn(7, 64)
    model = prepared(mlp())
    sk.convert_to_sparse(model, x)
    assert model[0].activation == "gelu"
    path, other = sk.save(model, tmp_path / "m"), mlp()
    other[1] = nn.ReLU()
    sk.load(other, path)
    assert type(other[1]) is nn.ReLU and other[0].activation == "none"
    assert names(other) == ["SparseLinear", "ReLU", "SparseLinear"]


def test_an_activation_of_the_layer_itself(tmp_path):
    model = nn.Sequential(sk.SparseLinear(16, 8, sparsity=0.5, activation="relu"))
    path, other, x = sk.save(model, tmp_path / "m"), nn.Sequential(nn.Linear(16, 8)), torch.ones(16)
    sk.load(other, path)
    assert torch.equal(other(x), model(x)) and other[0].activation == "relu"


def test_layers_that_cannot_be_swapped_stay_dense(tmp_path):
    model = nn.Sequential(sk.SparseLinear(16, 8, sparsity=0.5))
    path, hooked = sk.save(model, tmp_path / "m"), nn.Sequential(nn.Linear(16, 8))
    hooked[0].register_forward_hook(lambda *args: None)
    sk.load(hooked, path)
    assert type(hooked[0]) is nn.Linear
    assert torch.equal(hooked[0].weight, model[0].weight.to_dense())
    path, alone = sk.save(model[0], tmp_path / "m"), nn.Linear(16, 8)
    sk.load(alone, path)
    assert torch.equal(alone.weight, model[0].weight.to_dense())


def test_buffers_of_no_file(tmp_path):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("angles", torch.ones(4), persistent=False)

    path, other = sk.save(Rotary(), tmp_path / "m"), on_meta(Rotary)
    with pytest.raises(RuntimeError, match=r"Missing key.*'angles .on the meta device, in no"):
        sk.load(other, path)
    assert other.fc.weight.is_meta
    assert sk.load(other, path, strict=False).missing_keys[0].startswith("angles (on the meta")
    assert not other.fc.weight.is_meta and other.angles.is_meta


def test_a_refusal_builds_nothing(tmp_path):
    model = converted()
    path = sk.save(model, tmp_path / "m")
    tensors = load_file(path)
    tensors["2.weight.col"] = tensors["2.weight.col"] * 0 if "2.weight.col" in tensors else None
    metadata = _metadata(path)
    if tensors["2.weight.col"] is None:  # the code is a mask
        del tensors["2.weight.col"]
        tensors["2.weight.mask"] = tensors["2.weight.mask"] * 0
    save_file(tensors, path, metadata=metadata)
    for other in (mlp(), on_meta(mlp)):
        before = dict(other.named_parameters())
        with pytest.raises(ValueError, match=r"load: .*/m is damaged: layer '2.weight'"):
            sk.load(other, path)
        assert names(other) == ["Linear", "GELU", "Linear"]
        assert all(p is before[name] for name, p in other.named_parameters())


def _metadata(path) -> dict:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_files_of_the_first_version(tmp_path):
    path, x = sk.save(converted(), tmp_path / "m"), torch.randn(3, 64)
    metadata, tensors = _metadata(path), load_file(path)
    header = json.loads(metadata["sparsekern"])
    header = {key: header[key] for key in ("layers", "aliases", "folded")} | {"version": 1}
    save_file(tensors, path, metadata={"sparsekern": json.dumps(header)})
    other = mlp()
    sk.load(other, path)
    assert torch.equal(other(x), converted()(x))
