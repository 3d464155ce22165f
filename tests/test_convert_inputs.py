"""What the conversion was given and what it left: lists, other models, weights not looked at."""

import copy
import json

import pytest
import torch
from convert_common import forced, sparsified, wide
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekern as sk


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    forced(monkeypatch)


class TakesList(nn.Module):
    """As a detection model, which takes a list of images."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, rows):
        assert isinstance(rows, list)
        return [self.fc(row) for row in rows]


def test_lists_of_arguments_and_lists_as_an_argument():
    x = torch.randn(4, 512)
    assert sk.report(sk.convert_to_sparse(wide(), [x], cache=False)).n_sparse == 2
    model, rows = sparsified(TakesList()), [torch.randn(3, 64), torch.randn(2, 64)]
    want = model(rows)
    assert sk.report(sk.convert_to_sparse(model, rows, cache=False)).n_sparse == 1
    torch.testing.assert_close(model(rows), want)


def test_a_list_of_batches_gets_a_hint():
    model, x = wide(), torch.randn(4, 512)
    layers = list(model)
    with pytest.raises(ValueError, match=r"to be one batch: .*, got a list of 2, .* pass one"):
        sk.convert_to_sparse(model, [x, x])
    assert list(model) == layers


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Embedding(4, 4)),
         r"one with none, only weights without a sparse layer: 2 of Conv1d, 1 of Embedding "
         r"\(there are for nn.Linear, nn.Conv2d and transformers' Conv1D\)"),
        (nn.LSTM(8, 8), "2 of LSTM"),
        (nn.Sequential(sk.SparseLinear(8, 8)), "one with 1 layers that are sparse already"),
    ],
)  # fmt: skip
def test_a_model_without_a_layer_to_convert_names_what_it_has(model, message):
    with pytest.raises(ValueError, match=f"dense linear or convolution layers, got .*{message}"):
        sk.convert_to_sparse(model)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.rnn = nn.Linear(16, 16), nn.LSTM(16, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.words, self.experts = nn.Embedding(5, 16), nn.Parameter(torch.rand(4, 16, 8))

    def forward(self, x):
        return self.rnn(self.fc(x))[0]


def test_weights_that_were_not_looked_at_are_listed():
    model = sparsified(Mixed())
    model.lazy = nn.LazyLinear(8)  # without a shape yet
    report = sk.report(sk.convert_to_sparse(model, torch.randn(2, 3, 16), cache=False))
    found = {w.name: (w.kind, w.shape, w.reason) for w in report.left_out}
    assert found == {
        "experts": ("Mixed", (4, 16, 8), "a parameter of a module of its own kind"),
        "rnn.weight_ih_l0": ("LSTM", (32, 16), "no sparse layer of this kind"),
        "rnn.weight_hh_l0": ("LSTM", (32, 8), "no sparse layer of this kind"),
        "attention.in_proj_weight": (
            "MultiheadAttention", (48, 16), "the attention multiplies it itself"),
        "words.weight": ("Embedding", (5, 16), "rows are looked up, not multiplied"),
    }  # fmt: skip
    assert "5 weights not looked at, 2,128 numbers: experts (Mixed 4x16x8: a para" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["left_out"][0]["name"] == "experts"
    assert report.n_sparse == 1


def test_numbers_that_are_not_known_are_not_printed():
    """A layer that is not looked at has no pattern, a weight that is computed no share of zeros."""
    model = nn.Sequential(
        torch_prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.75),
        nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        nn.Linear(16, 16),
    ).eval()
    rows = sk.report(sk.convert_to_sparse(model, torch.randn(2, 16), cache=False)).layers
    assert [row.sparsity for row in rows] == [0.75, None, 0.0]
    assert [row.pattern for row in rows] == ["", "", ""]
    assert " -  " in str(sk.report(model))


def test_a_parent_that_reads_the_weight_is_named():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = sparsified(nn.TransformerEncoder(layer, 1))
    rows = sk.report(sk.convert_to_sparse(model, torch.randn(2, 3, 16), cache=False)).layers
    for row in rows:
        assert "reads the weight itself and does not call the layer" in row.reason


@pytest.mark.parametrize(
    ("layer", "shape"), [(sk.SparseLinear(8, 8), (1, 8)), (sk.SparseConv2d(4, 4, 3), (1, 4, 5, 5))]
)
def test_an_onnx_export_names_to_dense(monkeypatch, layer, shape):
    model, x = nn.Sequential(layer).eval(), torch.randn(shape)
    torch.jit.trace(model, x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    message = r"for ONNX, .* export sparsekern.to_dense\(copy.deepcopy\(model\)\)"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(model, x)
    with pytest.raises(RuntimeError, match=message):
        torch.export.export(model, (x,), strict=False)
    torch.jit.trace(sk.to_dense(copy.deepcopy(model)), x)


def test_the_default_device_is_not_the_models(monkeypatch):
    forced(monkeypatch)
    model = wide()
    x = torch.randn(2, model[0].in_features)
    want = model(x)
    with torch.device("meta"):
        converted = sk.convert_to_sparse(model, x, cache=False)
    assert sk.report(converted).n_sparse == 2
    torch.testing.assert_close(converted(x), want, rtol=1e-4, atol=1e-5)
