"""Layer collapse, looks at sparse layers, and layers that data does not reach."""

import warnings

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.prune.collapse import warn_of_collapse
from sparsekern.prune.targets import Layer


def unequal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    return model


def test_a_collapsed_layer_is_named():
    model = unequal()
    with pytest.warns(UserWarning, match=r"prune: .*collapse of '0' \(1 of 8,192\); scope='uni"):
        sk.prune(model, sparsity=0.95)
    assert sk.layer_collapse(model) == [] and sk.layer_collapse(model, threshold=0.01) == ["0"]
    assert sk.layer_collapse(model, threshold=1) == ["0", "2"]
    for bad in (-1, 2, True, "a"):
        with pytest.raises(ValueError, match=r"layer_collapse: expected threshold in \[0, 1\]"):
            sk.layer_collapse(model, threshold=bad)


def test_the_pruner_names_it_once():
    model = unequal()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = sk.schedules.Iterative(0.95, rounds=3, every=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruner = sk.Pruner(model, optimizer, schedule=schedule)
        for _ in range(5):
            optimizer.step()
            pruner.step()
    told = [w for w in told if "collapse of '0'" in str(w.message)]
    assert len(told) == 1 and str(told[0].message).startswith("Pruner: ")
    assert told[0].filename == __file__


@pytest.mark.parametrize("scope", ["uniform", "erk", "lamp", {"0": 0.999, "2": 0.5}])
def test_scopes_that_avoid_it_do_not_warn(scope):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.prune(unequal(), sparsity=0.95, scope=scope)


def test_no_alarm_for_normal_prunings():
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    zero = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    nn.init.zeros_(zero[1].weight)
    layers = [Layer(name, module) for name, module in zero.named_children()]
    empty = [torch.ones(16, 8, dtype=torch.bool), torch.zeros(8, 16, dtype=torch.bool)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_collapse("Pruner", layers, empty, "uniform")
        sk.prune(tiny, sparsity=0.99, scope="uniform")
        sk.prune(zero, sparsity=0.5)
        sk.prune(nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 10)), sparsity=0.95)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:16x16"])
@pytest.mark.parametrize("int8", [False, True])
def test_looks_count_sparse_layers(pattern, int8):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(16, 16, 3)).eval()
    options = {} if pattern == "2:4" else {"sparsity": 0.75}
    sk.prune(model, pattern=pattern, scope="uniform", ignore="1", **options)
    before = sk.sparsity_report(model)
    sparse = nn.Sequential(
        sk.SparseLinear.from_dense(model[0]), model[1], sk.SparseConv2d.from_dense(model[2])
    )
    if int8:
        sk.quantize(sparse)
    after = sk.sparsity_report(sparse)
    assert [row.shape for row in after.layers] == [row.shape for row in before.layers]
    assert after.left == () and after.total == before.total
    assert after.zeros >= before.zeros and after.layers[0].sparsity >= before.layers[0].sparsity
    assert list(sk.weight_histogram(sparse).zeros) == ["0", "1", "2"]
    assert sk.layer_collapse(sparse) == [] and sk.layer_collapse(sparse, ignore="0") == []
    assert sk.mask_overlap(model, sparse).total > 0.95
    assert sk.sparsity_report(sparse, ignore="0").skipped["0"] == "ignored"
    report = sk.prune(sparse, sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["1"]
    assert "sparse already" in report.skipped["0"] and report.model_total == before.total


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return self.e[int(x[0, 0] < 0)](x)


DATA = [torch.ones(4, 8), -torch.ones(4, 8)]


def loss(output, target):
    return output.square().sum(-1).mean()


@pytest.mark.parametrize("method", ["taylor", "snip", "grasp", "obd", "skeletonization"])
def test_gradients_sum_over_batches_that_miss_an_expert(method):
    pattern = "filter" if method == "skeletonization" else "unstructured"
    report = sk.prune(Experts(), method, 0.5, pattern, "uniform", data=DATA, loss_fn=loss)
    assert report.sparsity == 0.5
    assert {layer.note for layer in report.layers} == {"1 of 2 batches did not reach it"}


def test_an_expert_scores_as_if_it_were_alone():
    model = Experts()
    alone = nn.Linear(8, 8)
    alone.load_state_dict(model.e[1].state_dict())
    sk.prune(model, "taylor", 0.5, scope="uniform", data=DATA, loss_fn=loss)
    sk.prune(alone, "taylor", 0.5, scope="uniform", data=DATA[1:], loss_fn=loss)
    assert torch.equal(model.e[1].weight, alone.weight)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "refit"])
def test_methods_of_inputs_fall_back_to_magnitude(method):
    model = Experts()
    report = sk.prune(model, method, 0.5, data=DATA[:1])
    assert [layer.note for layer in report.layers] == [
        "", "pruned by magnitude, as no batch reaches it"
    ]  # fmt: skip
    assert report.layers[1].sparsity == 0.5
    assert sk.prune(Experts(), method, 0.5, data=DATA).layers[1].note == ""


def test_a_parent_that_reads_the_weight_is_named():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False
    )
    report = sk.prune(model.eval(), "wanda", 0.5, data=[torch.randn(2, 4, 16)])
    wanted = "MultiheadAttention 'layers.0.self_attn' reads its weight itself and never calls it"
    notes = {layer.name: layer.note for layer in report.layers if layer.note}
    assert notes == {"layers.0.self_attn.out_proj": f"pruned by magnitude, as {wanted}"}
    with pytest.raises(ValueError, match=r"MultiheadAttention 'layers.0.self_attn' reads its w"):
        sk.owl(model, [torch.randn(2, 4, 16)], 0.5)
