import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekern import patterns
from sparsekern.prune import Pruner, prune
from sparsekern.prune.allocation import erdos_renyi_kernel
from sparsekern.prune.methods import METHODS, Method
from sparsekern.prune.scores import rank_in_rows


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.Flatten(),
        nn.Linear(12 * 16, 6),
    )


def weights(model):
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def zeros(weight):
    return int((weight == 0).sum())


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


sparsities = st.floats(0, 0.98)


@given(sparsities, st.sampled_from(["global", "erk"]), st.sampled_from(["magnitude", "random"]))
@settings(max_examples=40, deadline=None)
def test_totals_are_exact_to_one_weight(sparsity, scope, method):
    model = cnn()
    report = prune(model, method, sparsity, scope=scope)
    total = sum(w.numel() for w in weights(model))
    wanted = min(math.floor(sparsity * total + 0.5), total - 3)
    assert report.total == total
    assert report.zeros == sum(zeros(w) for w in weights(model)) == wanted
    assert all(zeros(w) < w.numel() for w in weights(model))


@given(sparsities, st.sampled_from(["magnitude", "random"]))
@settings(max_examples=20, deadline=None)
def test_uniform_is_exact_in_every_layer(sparsity, method):
    report = prune(cnn(), method, sparsity, scope="uniform")
    for layer in report.layers:
        wanted = min(math.floor(sparsity * layer.total + 0.5), layer.total - 1)
        assert layer.zeros == wanted


@given(
    st.floats(0, 0.9),
    st.sampled_from(["block:4x4", "block:3x5", "vector:1x4", "kernel", "filter", "channel"]),
    st.sampled_from(["uniform", "global", "erk"]),
)
@settings(max_examples=60, deadline=None)
def test_units_are_exact_to_one_unit(sparsity, text, scope):
    model, pattern = cnn(), patterns.parse(text)
    report = prune(model, "magnitude", sparsity, text, scope)
    largest = max(math.prod(pattern.tile(layer.shape)) for layer in report.layers)
    assert abs(report.zeros - sparsity * report.total) <= largest * (
        len(report.layers) if scope == "uniform" else 1
    )
    pruned = [w for w in weights(model) if not pattern.misfit(w.shape)]
    assert len(pruned) == len(report.layers)
    assert all(pattern.verify(w) and zeros(w) < w.numel() for w in pruned)


def test_global_magnitude_keeps_the_largest_of_all_layers():
    model, dense = mlp(), mlp()
    prune(model, "magnitude", 0.7, scope="global")
    kept = torch.cat([w.flatten() for w in weights(model)]).abs()
    before = torch.cat([w.flatten() for w in weights(dense)]).abs()
    assert kept[kept > 0].min() >= before[kept == 0].max()


def test_global_never_empties_a_layer():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    for text in ("unstructured", "filter", "block:8x8"):
        pruned = copy.deepcopy(model)
        report = prune(pruned, "magnitude", 0.95, text, "global")
        assert all(layer.zeros < layer.total for layer in report.layers)


def test_equal_weights_are_pruned_from_the_end():
    layer = nn.Linear(10, 10)
    nn.init.ones_(layer.weight)
    prune(layer, sparsity=0.33)
    assert layer.weight.flatten().tolist() == [1.0] * 67 + [0.0] * 33


def test_magnitude_power_ranks_units_by_l1_or_l2():
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0, 0, 3], [1, 1, 1, 1]]))
    l1, l2 = copy.deepcopy(layer), copy.deepcopy(layer)
    prune(l1, "magnitude", 0.5, "filter")
    prune(l2, "magnitude", 0.5, "filter", p=2)
    assert l1.weight[0].eq(0).all() and l2.weight[1].eq(0).all()


def test_erk_by_hand():
    # eps = 100 / (30 + 20) = 2
    assert erdos_renyi_kernel([(20, 10), (10, 10)], [1, 1], 100) == pytest.approx([60, 40])
    # 200 / (80 + 8) = 2.27 would give the small layer 18.2 of 16 weights: it becomes dense.
    assert erdos_renyi_kernel([(40, 40), (4, 4)], [1, 1], 200) == pytest.approx([184, 16])
    # Kernel dimensions count: sums 8 + 4 + 3 + 3 = 18 and 22.
    shapes = [(8, 4, 3, 3), (12, 10)]
    assert erdos_renyi_kernel(shapes, [1, 1], 80) == pytest.approx([36, 44])
    # A floor takes from the others; a budget below all floors gives the floors.
    assert erdos_renyi_kernel([(40, 40), (4, 4)], [1, 12], 100) == pytest.approx([88, 12])
    assert erdos_renyi_kernel([(40, 40), (4, 4)], [32, 12], 10) == pytest.approx([32, 12])


def test_erk_scope_reaches_the_layers():
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(10, 10))
    report = prune(model, "magnitude", 2 / 3, scope="erk")
    assert [layer.total - layer.zeros for layer in report.layers] == [60, 40]


def test_dict_scope():
    model = mlp()
    report = prune(model, scope={"[02]": 0.5, "2": 0.75})
    assert [layer.sparsity for layer in report.layers] == [0.5, 0.75, 0.0]
    report = prune(mlp(), sparsity=0.25, scope={"4": 0.5})
    assert [layer.sparsity for layer in report.layers] == [0.25, 0.25, 0.5]
    report = prune(mlp(), pattern="2:4", scope={"0": 0.5})
    assert [layer.sparsity for layer in report.layers] == [0.5, 0.0, 0.0]
    assert report.scope == "dict"


@pytest.mark.parametrize("scope", ["uniform", "global", "erk"])
def test_nm_prunes_every_layer_alike_and_conv_along_channels(scope):
    model = cnn()
    report = prune(model, "magnitude", pattern="2:4", scope=scope)
    assert report.sparsity == 0.5
    first = model[0].weight.movedim(1, -1)  # (out, kh, kw, in)
    assert ((first != 0).sum(-1) == 2).all()
    assert prune(cnn(), pattern="2:4", sparsity=0.5).sparsity == 0.5


def test_layers_the_pattern_does_not_divide_are_left_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    before = model[0].weight.clone()
    report = prune(model, pattern="2:4")
    reason = "pattern 2:4 needs an input dimension that is a multiple of 4, got 3"
    assert report.skipped == {"0": reason} and [layer.name for layer in report.layers] == ["1"]
    assert torch.equal(model[0].weight, before) and reason[:20] in str(report)


def test_tied_and_shared_weights_are_pruned_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.a, self.b = nn.Linear(8, 12, bias=False), nn.Linear(8, 12)
            self.again = self.b
            self.a.weight = self.embed.weight
            self.view = nn.Linear(8, 12)
            self.view.weight = nn.Parameter(self.b.weight.data)  # same memory, other parameter

    model = Tied()
    report = prune(model, sparsity=0.5)
    assert [(layer.name, layer.aliases) for layer in report.layers] == [
        ("a", ("embed",)),
        ("b", ("again", "view")),
    ]
    assert report.total == 192 and report.zeros == 96
    # An ignored layer keeps its weight, whoever else uses it.
    model = Tied()
    with pytest.raises(ValueError, match="'a' shares its weight with 'embed', which is ignored"):
        prune(model, sparsity=0.5, ignore=[nn.Embedding, "again"])
    assert zeros(model.embed.weight) == 0 and zeros(model.b.weight) == 0


@pytest.mark.parametrize("ignore", ["0", ["0"], ["[0]"], [nn.ReLU, "0"]])
def test_ignore(ignore):
    model = mlp()
    report = prune(model, ignore=ignore)
    assert report.skipped == {"0": "ignored"} and zeros(model[0].weight) == 0


def test_ignore_by_enclosing_module():
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(4, 4)})
    report = prune(model, ignore=["body"])
    assert [layer.name for layer in report.layers] == ["head"] and len(report.skipped) == 3


def test_conv1d_of_transformers_is_pruned_as_out_by_in():
    torch.manual_seed(0)
    layer = Conv1D(6, 8)
    report = prune(layer, pattern="2:4")
    assert report.layers[0].shape == (6, 8)
    assert ((layer.weight != 0).view(2, 4, 6).sum(1) == 2).all()


def test_dtypes_and_no_grad_and_other_parameters_stay():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer = nn.Linear(16, 16).to(dtype)
        parameter, bias = layer.weight, layer.bias.clone()
        prune(layer, sparsity=0.75)
        assert layer.weight is parameter and parameter.dtype == dtype and parameter.requires_grad
        assert zeros(parameter) == 192 and torch.equal(layer.bias, bias)


def test_random_depends_on_the_seed_alone():
    masks = []
    for options in ({}, {"seed": 0}, {"seed": 1}, {"generator": torch.Generator().manual_seed(1)}):
        model = mlp(seed=len(masks))
        prune(model, "random", 0.5, **options)
        masks.append(torch.cat([(w != 0).flatten() for w in weights(model)]))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_random_does_not_favour_small_units():
    # Rows of 4 and of 400 weights: by their mean, only small units could be extreme.
    model = nn.Sequential(nn.Linear(4, 1000), nn.Linear(400, 1000))
    report = prune(model, "random", 0.9, "filter", "global")
    assert all(abs(layer.sparsity - 0.9) < 0.04 for layer in report.layers)


def test_rank_in_rows_prunes_every_row_alike():
    scores = torch.rand(7, 10) * torch.logspace(-3, 3, 7)[:, None]
    ranks = rank_in_rows(scores.flatten(), 7, 1).view(7, 10)
    assert torch.equal(ranks.argsort(1), scores.argsort(1))
    mask = patterns.Unstructured().mask(ranks, 0.5)
    assert (mask.sum(1) == 5).all()
    sizes = torch.tensor([4, 4, 2] * 2)
    got = rank_in_rows(torch.tensor([3.0, 2, 1, 10, 30, 20]), 2, sizes)
    assert got.tolist() == pytest.approx([0, -0.4, -0.8, -0.6, 0, -0.4])
    assert torch.equal(rank_in_rows(scores[:, 0], 7, 10), scores[:, 0])


def test_report():
    report = prune(mlp(), sparsity=0.5)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["shape"] == [20, 12]
    text = report.table()
    assert str(report) == text and "20 x 12" in text and "50.00%" in text
    assert report.to_dict()["sparsity"] == report.sparsity == 0.5
    assert "(model)" in str(prune(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.2}, r"prune: expected sparsity in \[0, 1\), got 1.2"),
        ({"sparsity": -0.1}, r"prune: expected sparsity in \[0, 1\), got -0.1"),
        ({"sparsity": math.nan}, r"prune: expected sparsity in \[0, 1\), got nan"),
        ({"sparsity": "0.9"}, r"prune: expected sparsity in \[0, 1\), got '0.9'"),
        ({"pattern": "3x3"}, "parse: expected a pattern, one of .*got '3x3'"),
        (
            {"pattern": "2:4", "sparsity": 0.9},
            r"prune: expected sparsity 0.5 \(fixed by pattern 2:4\), got 0.9",
        ),
        (
            {"method": "magic"},
            "prune: expected method one of apoz, .*, magnitude, .*, wanda; got 'magic'",
        ),
        (
            {"scope": "all"},
            "prune: expected scope one of global, uniform, erk, lamp, std, or a dict; got 'all'",
        ),
        ({"scope": {"fc": 0.5}}, r"expected scope to name layers \(\['0', '2', '4'\]\), got 'fc'"),
        ({"scope": {"0": 1}}, r"prune: scope\['0'\]: expected sparsity in \[0, 1\), got 1"),
        (
            {"scope": {"0": 0.9}, "pattern": "2:4"},
            r"prune: scope\['0'\]: expected sparsity 0.5 \(fixed by pattern 2:4\), got 0.9",
        ),
        ({"method": "wanda"}, "prune: expected data, which method 'wanda' needs, got None"),
        ({"method": "wanda", "data": []}, "prune: expected data with at least one batch, got none"),
        (
            {"method": "sparsegpt", "pattern": "filter"},
            "prune: method 'sparsegpt' needs units within rows, got pattern filter",
        ),
        ({"ignore": ["fc9"]}, "prune: expected ignore to match a module, got 'fc9'"),
        ({"ignore": "*"}, "prune: expected a model with a prunable layer, got '0' ignored; '2' ig"),
        ({"targets": nn.Conv2d}, "expected a model with a prunable layer, got none of the target"),
        ({"p": 0}, "prune: expected p > 0, got 0"),
        ({"method": "sparsegpt", "percdamp": -1}, "prune: expected percdamp >= 0, got -1"),
        ({"method": "sparsegpt", "blocksize": 0}, "expected blocksize of at least 1, got 0"),
    ],
)
def test_bad_values_are_refused_and_nothing_changes(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(mlp())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "prune: expected options of method 'magnitude' among p; got 'seed'"),
        ({"loss_fn": "mse"}, "prune: expected loss_fn to be callable, got str"),
        ({"targets": nn.ReLU}, "prune: expected targets to be nn.Linear, .* got ReLU"),
        ({"targets": nn.ConvTranspose2d}, "expected targets to be .* got ConvTranspose2d"),
        ({"targets": None}, "expected targets to be .* got None"),
        ({"ignore": [3]}, "prune: expected ignore to hold names, globs or types, got 3"),
        ({"method": "random", "generator": 3}, "prune: expected generator on the CPU, got 3"),
        ({"method": "wanda", "data": torch.ones(2, 12)}, "expected data to be an iterable.*Tensor"),
        (
            {"method": "wanda", "data": 3},
            "prune: expected data to be an iterable of batches, got int",
        ),
        ({"method": "wanda", "data": [(1, 2, 3)]}, r"an input or a pair .* got a tuple of 3"),
        ({"method": "wanda", "data": ["a"]}, "inputs to be tensors, tuples or dicts, got str"),
    ],
)
def test_wrong_types_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        prune(mlp(), **options)


def test_bad_models_are_refused():
    with pytest.raises(TypeError, match=r"prune: expected a torch.nn.Module, got list"):
        prune([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="got none of the target types"):
        prune(nn.Sequential())
    with pytest.raises(ValueError, match="weight of layer '0' to hold data, got meta"):
        prune(nn.Sequential(nn.Linear(4, 4, device="meta")))
    with pytest.raises(ValueError, match="expected layer '0' to be initialized, got a lazy weight"):
        prune(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(ValueError, match=r"expected layer '' to be floating point, got torch.co"):
        prune(nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="got '' has no weights"):
        prune(nn.Linear(0, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"'1' its weight is computed by a parametrization"):
        prune(model[1:])
    assert zeros(model[0].weight) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    model = mlp()
    with torch.no_grad():
        model[4].weight[1, 1] = bad
    with pytest.raises(ValueError, match="expected finite weights in layer '4', got NaN or Inf"):
        prune(model)
    assert zeros(model[0].weight) == 0
    assert prune(model, ignore="4").sparsity == 0.9


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
def test_scores_that_are_nan_are_refused(pattern, monkeypatch):
    @dataclass(frozen=True)
    class Broken(Method):
        def score(self, layer, total):
            return layer.weight * math.nan

    monkeypatch.setitem(METHODS, "broken", Broken)
    with pytest.raises(ValueError, match="expected scores without NaN in layer '0', got NaN"):
        prune(mlp(), "broken", pattern=pattern)


def test_every_method_is_named_in_the_documentation():
    for name, method in METHODS.items():
        where = prune if method.one_shot else Pruner.__init__
        assert f'"{name}"' in where.__doc__
