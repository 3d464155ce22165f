"""Reports list every weight that a pruning did not look at, and layers that compute theirs."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import sparsekern as sk


class Mixed(nn.Module):
    """Types that prune does not take, around one layer that it does."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(50, 8), nn.LSTM(8, 16)
        self.up, self.line = nn.ConvTranspose2d(4, 4, 3), nn.Conv1d(4, 4, 3)
        self.experts, self.fc = nn.Parameter(torch.ones(2, 3, 4)), nn.Linear(16, 10)
        self.empty = nn.Linear(0, 4)


def test_every_weight_is_in_the_report():
    model = Mixed()
    report = sk.prune(model, sparsity=0.5)
    weights = [p for p in model.parameters() if p.ndim >= 2]
    assert [layer.name for layer in report.layers] == ["fc"]
    assert report.total + sum(row.total for row in report.left) == report.model_total
    assert report.model_total == sum(p.numel() for p in weights)
    assert report.model_zeros == 80 and report.model_sparsity == 80 / report.model_total
    reasons = report.skipped
    assert set(reasons) == {
        "embed", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "up", "line", "experts", "empty"
    }  # fmt: skip
    assert "LSTM, which prune does not know" in reasons["rnn.weight_ih_l0"]
    assert "ConvTranspose2d, which prune" in reasons["up"] and "Mixed" in reasons["experts"]
    assert reasons["line"].endswith("add nn.Conv1d to targets")
    found = json.loads(json.dumps(report.to_dict()))
    assert found["model"]["total"] == report.model_total
    assert {row["name"]: row["total"] for row in found["left"]}["experts"] == 24
    text = str(report)
    assert "left as it is" in text and f"whole model: {report.model_sparsity:.2%} of" in text
    assert "pruned layers: 50.00% of 160 weights" in text and "in 7 parameters" in text
    pruner = sk.Pruner(model, torch.optim.SGD(model.parameters(), 0.1), sparsity=0.5)
    assert pruner.report().skipped == reasons
    assert sk.sparsity_report(model).skipped == reasons
    assert sk.sensitivity(model, lambda m: 1.0, (0.5,)).skipped == reasons


def test_tied_weights_count_once():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    report = sk.prune(model, sparsity=0.5)
    assert report.left == () and report.model_total == report.total == 32
    model["twice"] = model["other"] = nn.Embedding(5, 4)
    assert [row.name for row in sk.sparsity_report(model).left] == ["twice"]


def test_no_target_names_what_was_found():
    with pytest.raises(ValueError, match=r"found LSTM \(128 weights\); prune takes none of these"):
        sk.prune(nn.LSTM(4, 4))
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Embedding(3, 3))
    wanted = r"Conv1d \(48 weights\), Embedding \(9 weights\); pass targets=nn.Conv1d"
    for act in (sk.prune, sk.sparsity_report, lambda m: sk.threshold_scope(m, 1.0)):
        with pytest.raises(ValueError, match=wanted):
            act(model)


@pytest.mark.parametrize(
    "wrap, reason",
    [
        (parametrizations.weight_norm, "parametrization (_WeightNorm)"),
        (parametrizations.spectral_norm, "parametrization (_SpectralNorm)"),
        (nn.utils.weight_norm, "by weight_norm"),
        (nn.utils.spectral_norm, "by spectral_norm"),
        (lambda m: torch_prune.l1_unstructured(m, "weight", 0.5), "masked by torch.nn.utils.prune"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_are_left_with_the_reason(wrap, reason):
    model = nn.Sequential(nn.Linear(8, 8), wrap(nn.Linear(8, 8)))
    report = sk.prune(model, sparsity=0.5)
    assert list(report.skipped) == ["1"] and reason in report.skipped["1"]
    assert all(row.name.startswith("1.") for row in report.left) and report.left
    for ignore in ("1", "1*", ["1"]):
        assert sk.prune(model, sparsity=0.5, ignore=ignore).skipped == {"1": "ignored"}
    pruner = sk.Pruner(model, torch.optim.SGD(model.parameters(), 0.1), sparsity=0.5)
    assert list(pruner.finalize().skipped) == ["1"]
    if "torch.nn.utils.prune" in reason:
        assert report.left[0].zeros == 32


def test_ignore_counts_before_any_check():
    lazy = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    assert sk.prune(lazy, sparsity=0.5, ignore="1").skipped == {"1": "ignored"}
    meta = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, device="meta"))
    assert sk.prune(meta, sparsity=0.5, ignore=["1"]).left[0].total == 32


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Added(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.low, self.high = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.zeros(2, 8))

    def forward(self, x):
        return F.linear(x, self.weight + self.low @ self.high, self.bias)


@pytest.mark.parametrize("layer", [Standardised(8, 8, 3), Standardised(8, 8, 1), Added(8, 8)])
def test_layers_that_compute_their_weight_in_forward_are_left(layer):
    before = layer.weight.clone()
    report = sk.prune(nn.Sequential(nn.Linear(8, 8), layer), sparsity=0.5)
    assert "computes its weight in forward" in report.skipped["1"]
    assert torch.equal(layer.weight, before)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class ByProduct(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t()


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 3, self.bias)


class CallsBase(nn.Linear):
    def forward(self, x):
        return super().forward(x.relu())


@pytest.mark.parametrize(
    "layer", [PadsItself(8, 8, 3), ByProduct(8, 8), Scaled(8, 8), Scaled(4, 1), CallsBase(3, 8)]
)
def test_forwards_that_keep_zeros_are_pruned_without_a_note(layer):
    state = torch.get_rng_state()
    report = sk.prune(layer, sparsity=0.5)
    assert report.sparsity == 0.5 and report.layers[0].note == ""
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_cannot_be_followed_gets_a_note():
    class Strange(nn.Linear):
        def forward(self, x, y):
            return F.linear(x + y, self.weight)

    report = sk.prune(Strange(8, 8), sparsity=0.5)
    assert "Strange has a forward of its own" in report.layers[0].note
    assert "Strange has a forward of its own" in str(report)


def test_adapters_stay():
    class BaseTunerLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            self.vera = nn.Linear(8, 8)

    report = sk.prune(nn.ModuleDict({"q": BaseTunerLayer()}), sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["q.base_layer"]
    assert report.skipped == dict.fromkeys(
        ("q.lora_A.default", "q.vera"), "is an adapter, which stays as it is"
    )
