"""A report owns up to what a pruning left: what it did not look at, with size and reason."""

import json

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import sparsekern as sk
from sparsekern.prune import Pruner, prune


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(32, 64, 2), nn.Linear(64, 10)
        self.table = nn.Parameter(torch.randn(5, 6))


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        mean, std = (f((1, 2, 3), keepdim=True) for f in (w.mean, w.std))
        return F.conv2d(x, (w - mean) / std, self.bias)


class PaddedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        return self.e[int(x[0, 0] < 0)](x)


BOTH = [torch.ones(8, 16), -torch.ones(8, 16)]
LOSS = {"data": BOTH, "loss_fn": lambda output, _: output.square().mean()}


def share_of_zeros(model):
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (Tagger(), {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_ih_l1", "rnn.weight_hh_l1",
                    "table"}),
        (nn.TransformerEncoderLayer(32, 4, 64), {"self_attn.in_proj_weight"}),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3)), {"1"}),
        (nn.Sequential(nn.Conv1d(1, 8, 9), nn.Conv3d(1, 8, 3), nn.Linear(8, 8)), {"0", "1"}),
        (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Bilinear(4, 4, 3)), {"0", "2"}),
    ],
)  # fmt: skip
def test_what_was_not_looked_at_is_listed(model, left):
    report = prune(model, sparsity=0.9, scope="uniform")
    assert {row.name for row in report.left} == left <= set(report.skipped)
    assert report.model_sparsity == pytest.approx(share_of_zeros(model))
    assert report.sparsity == pytest.approx(0.9, abs=0.02)
    assert report.model_total == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    text = str(report)
    for row in report.left:
        assert row.name in text and f"{row.total:,}" in text
    assert f"whole model: {report.model_sparsity:.2%} of {report.model_total:,} weights" in text
    assert json.loads(json.dumps(report.to_dict()))["model"]["total"] == report.model_total


def test_nothing_left_says_nothing():
    report = prune(nn.Sequential(nn.Linear(16, 16)), sparsity=0.5)
    assert report.left == () and "left as" not in str(report)
    assert report.model_sparsity == report.sparsity == 0.5


def test_the_pruner_and_the_looks_list_it_too():
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert len(Pruner(model, optimizer, sparsity=0.5).report().left) == 5
    assert len(sk.sparsity_report(Tagger()).left) == 5


def test_a_model_of_other_types_is_refused_with_their_names():
    with pytest.raises(ValueError, match=r"found LSTM \(3,072 weights\); prune takes none of"):
        prune(nn.Sequential(nn.LSTM(16, 16, 1), nn.LSTM(8, 8, 2)))
    with pytest.raises(ValueError, match=r"found Conv1d \(27 weights\); pass targets=nn.Conv1d"):
        prune(nn.Sequential(nn.Conv1d(3, 3, 3)))
    with pytest.raises(ValueError, match="holds no weight of two dimensions or more"):
        prune(nn.Sequential(nn.ReLU()))


def test_layers_that_compute_their_weight_are_left():
    model = nn.Sequential(StandardisedConv(8, 8, 3), nn.Conv2d(8, 8, 3))
    report = prune(model, sparsity=0.9)
    assert "StandardisedConv computes its weight in forward" in report.skipped["0"]
    assert [layer.name for layer in report.layers] == ["1"]
    for plain in (PaddedConv(8, 8, 3), ScaledLinear(8, 8)):  # zeros survive
        assert prune(nn.Sequential(plain), sparsity=0.5).sparsity == 0.5


def test_computed_weights_are_left_with_the_remedy_and_ignore_counts_first():
    made = {
        "weight_norm": parametrizations.weight_norm(nn.Linear(8, 8)),
        "spectral": parametrizations.spectral_norm(nn.Linear(8, 8)),
        "old_weight_norm": weight_norm(nn.Linear(8, 8)),
        "old_spectral": spectral_norm(nn.Linear(8, 8)),
        "masked": torch_prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
    }
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), **made})
    report = prune(model, sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["plain"]
    wanted = {
        "weight_norm": "remove_parametrizations", "spectral": "remove_parametrizations",
        "old_weight_norm": "remove_weight_norm", "old_spectral": "remove_spectral_norm",
        "masked": "torch.nn.utils.prune.remove",
    }  # fmt: skip
    for name, remedy in wanted.items():
        assert remedy in report.skipped[name]
    assert prune(model, sparsity=0.5, ignore=list(made)).skipped["masked"] == "ignored"
    assert Pruner(model, torch.optim.SGD(model.parameters(), 0.1), sparsity=0.5)
    nan = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        nan[1].weight[0, 0] = torch.nan
    assert prune(nan, sparsity=0.5, ignore="1").skipped["1"] == "ignored"


def test_adapters_stay():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2)})

    report = prune(nn.Sequential(Adapted()), sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["0.base_layer"]
    assert report.skipped["0.lora_A.default"] == "is an adapter, which stays as it is"


@pytest.mark.parametrize("method", ["snip", "taylor", "grasp", "obd"])
def test_gradients_of_experts_are_summed_over_batches(method):
    report = prune(Experts(), method, 0.5, scope="uniform", **LOSS)
    assert {layer.note for layer in report.layers} == {"1 of 2 batches did not reach it"}
    assert report.sparsity == 0.5
    with pytest.raises(ValueError, match=r"that depends on layer 'e.1', got one that does not"):
        prune(Experts(), method, 0.5, data=BOTH[:1], loss_fn=LOSS["loss_fn"])


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_wanda_falls_back_to_magnitude_without_data(scope):
    model = Experts()
    report = prune(model, "wanda", 0.5, scope=scope, data=BOTH[:1])
    seen, unseen = report.layers
    assert not seen.note and unseen.note == "pruned by magnitude, as no batch reaches it"
    assert report.sparsity == 0.5 and min(seen.zeros, unseen.zeros) > 50


def test_a_weight_that_its_parent_reads_itself_is_named():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    report = prune(model, "wanda", 0.5, data=[torch.randn(2, 4, 16)])
    notes = {row.name: row.note for row in report.layers}
    why = "pruned by magnitude, as MultiheadAttention 'layers.0.self_attn' reads its weight itself"
    assert why in notes["layers.0.self_attn.out_proj"]
    assert not notes["layers.0.linear1"]


def collapsing():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    with torch.no_grad():
        model[0].weight *= 1e-3
    return model


def test_collapse_is_warned_of_with_what_avoids_it():
    model = collapsing()
    with pytest.warns(UserWarning, match=r"collapse of '0' \(1 of 8,192\); scope='uniform"):
        prune(model, sparsity=0.95)
    assert sk.layer_collapse(model) == []
    assert sk.layer_collapse(model, threshold=0.01) == ["0"]
    with pytest.raises(ValueError, match=r"layer_collapse: expected threshold in \[0, 1\], got 2"):
        sk.layer_collapse(model, threshold=2)


def test_the_pruner_warns_once():
    model = collapsing()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    schedule = sk.schedules.Cubic(0.9, 0.96, 0, 4, 1)
    with pytest.warns(UserWarning, match="Pruner: .* collapse of '0'") as told:
        pruner = Pruner(model, optimizer, schedule=schedule)
        for _ in range(6):
            model(torch.randn(4, 64)).sum().backward()
            optimizer.step()
            pruner.step()
    (one,) = [w for w in told if "collapse" in str(w.message)]
    assert one.filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scope", ["uniform", "erk", "lamp", "global", {"0": 0.999}])
def test_ordinary_prunings_warn_of_nothing(scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                          nn.Linear(64, 10))  # fmt: skip
    prune(model, sparsity=0.98, scope=scope)


def test_looks_count_sparse_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Conv2d(4, 4, 3))
    prune(model, sparsity=0.9, scope="uniform")
    want = sk.sparsity_report(model)
    for pattern in (None, "int8"):
        for i in (0, 2):
            model[i] = sk.SparseLinear.from_dense(model[i]) if pattern is None else model[i]
        model[3] = sk.SparseConv2d.from_dense(model[3]) if pattern is None else model[3]
        if pattern:
            sk.quantize(model.eval())
        got = sk.sparsity_report(model)
        assert (got.zeros, got.total, got.left) == (want.zeros, want.total, ())
        assert sk.layer_collapse(model) == []
        assert len(sk.weight_histogram(model).counts) == 3
    with pytest.raises(ValueError, match="expected a model with a prunable layer"):
        prune(model)
