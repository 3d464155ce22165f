"""Methods that look at data: Wanda, SparseGPT, and the statistics they stand on."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparsekern import patterns
from sparsekern.prune import owl, prune
from sparsekern.prune.calibration import input_rows
from sparsekern.prune.targets import Layer


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)
    )


def correlated(batches=4, rows=128, width=24):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return [torch.randn(rows, width, generator=generator) @ mix.T for _ in range(batches)]


def weights(model):
    return [m.weight.detach() for m in model.modules() if hasattr(m, "weight")]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b)))


def output_error(model, dense, data):
    with torch.no_grad():
        errors = [(model(x) - dense(x)).pow(2).sum() for x in data]
    return float(sum(errors))


CONVS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "groups": 2, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1, "padding": 2, "padding_mode": "circular"},
]


@pytest.mark.parametrize("options", CONVS)
def test_input_rows_times_the_weight_is_the_convolution(options):
    conv = nn.Conv2d(4, 8, bias=False, **options)
    x = torch.randn(3, 4, 9, 8)
    layer = Layer("", conv)
    rows = torch.cat(list(input_rows(layer, x)), dim=1)
    grouped = layer.weight.reshape(conv.groups, -1, rows.shape[-1])
    got = (rows @ grouped.mT).permute(1, 0, 2).reshape(3, -1, 8).permute(0, 2, 1)
    torch.testing.assert_close(got.reshape(conv(x).shape), conv(x).detach())


def test_input_rows_of_1d_and_3d_convolutions_and_single_images():
    for conv, shape in (
        (nn.Conv1d(4, 6, 3, stride=2, bias=False), (2, 4, 11)),
        (nn.Conv3d(2, 6, 2, padding=1, bias=False), (2, 2, 4, 5, 3)),
        (nn.Conv2d(2, 6, 2, bias=False), (2, 5, 5)),
    ):
        x = torch.randn(shape)
        (rows,) = input_rows(Layer("", conv), x)
        got, wanted = rows[0] @ conv.weight.flatten(1).T, conv(x)
        wanted = wanted[None] if wanted.ndim == conv.weight.ndim - 1 else wanted
        torch.testing.assert_close(got, wanted.movedim(1, -1).reshape(-1, 6))


def test_wanda_is_its_formula_within_each_row():
    layer, data = nn.Linear(24, 10), correlated()
    before, norms = layer.weight.detach().clone(), torch.cat(data).norm(dim=0)
    prune(layer, "wanda", 0.5, data=data)
    for row, old in zip(layer.weight, before):
        kept = (old.abs() * norms).topk(12).indices
        wanted = torch.zeros_like(old).index_copy(0, kept, old[kept])
        assert torch.equal(row, wanted)


def test_wanda_in_vectors_of_eight_inputs():
    layer, data = nn.Linear(24, 10), correlated()
    before, norms = layer.weight.detach().clone(), torch.cat(data).norm(dim=0)
    prune(layer, "wanda", 2 / 3, "vector:1x8", data=data)
    for row, old in zip(layer.weight, before):
        scores = [float((old * norms)[start : start + 8].abs().mean()) for start in (0, 8, 16)]
        best = 8 * scores.index(max(scores))
        wanted = torch.zeros_like(old)
        wanted[best : best + 8] = old[best : best + 8]
        assert torch.equal(row, wanted)


def test_wanda_in_a_grouped_convolution_and_globally():
    torch.manual_seed(0)
    conv, x = (
        nn.Conv2d(4, 6, 3, groups=2),
        torch.randn(8, 4, 7, 7) * torch.tensor([1, 5, 1, 9.0])[:, None, None],
    )
    before = conv.weight.detach().clone()
    norms = nn.functional.unfold(x, 3).pow(2).sum((0, 2)).sqrt().view(2, 2, 3, 3)
    scores = before.abs() * norms.repeat_interleave(3, dim=0)
    uniform, joint = copy.deepcopy(conv), copy.deepcopy(conv)
    prune(uniform, "wanda", 0.5, data=[x])
    for row, score in zip(uniform.weight.flatten(1), scores.flatten(1)):
        assert set(row.nonzero().flatten().tolist()) == set(score.topk(9).indices.tolist())
    prune(joint, "wanda", 0.5, scope="global", data=[x])
    kept = patterns.Unstructured().mask(scores, 0.5)
    assert torch.equal(joint.weight != 0, kept)


@pytest.mark.parametrize("pattern", ["2:4", "block:4x4", "vector:1x4", "filter", "channel"])
@pytest.mark.parametrize("scope", ["uniform", "global", "erk"])
def test_wanda_serves_every_pattern_and_scope(pattern, scope):
    model, parsed = mlp(), patterns.parse(pattern)
    report = prune(model, "wanda", 0.5, pattern, scope, data=correlated())
    assert abs(report.sparsity - 0.5) < 0.04
    assert all(parsed.verify(w) for w in weights(model))


def surgeon_reference(weight, hessian, mask):
    """Optimal Brain Surgeon from left to right: each loss is spread over the columns after it."""
    weight = weight.clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(weight.shape[0]):
            if not mask[row, j]:
                weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
                weight[row, j] = 0
    return weight


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:3x5", "vector:1x4"])
@pytest.mark.parametrize("blocksize", [8, 128])
def test_sparsegpt_updates_like_optimal_brain_surgeon(pattern, blocksize):
    layer, data = nn.Linear(24, 9).double(), [x.double() for x in correlated()]
    before = layer.weight.detach().clone()
    rows = torch.cat(data)
    hessian = rows.T @ rows
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    report = prune(layer, "sparsegpt", 0.5, pattern, data=data, blocksize=blocksize)
    mask = layer.weight != 0
    wanted = surgeon_reference(before, hessian, mask)
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-6, atol=1e-8)
    assert patterns.parse(pattern).verify(layer.weight)
    assert abs(report.zeros - 108) <= (0 if pattern in ("unstructured", "2:4") else 7)


def test_sparsegpt_first_block_takes_the_cheapest_weights():
    layer, data = nn.Linear(24, 9).double(), [x.double() for x in correlated()]
    rows = torch.cat(data)
    hessian = rows.T @ rows
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    # Column j's loss is measured with the columns before it gone, so its H starts at j.
    remaining = [torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(24)]
    scores = layer.weight.detach() ** 2 / torch.stack(remaining)
    prune(layer, "sparsegpt", 0.5, data=data)
    assert torch.equal(layer.weight != 0, patterns.Unstructured().mask(scores, 0.5))


def test_sparsegpt_scores_a_unit_by_the_loss_of_all_its_columns():
    layer, data = nn.Linear(24, 9).double(), [x.double() for x in correlated()]
    rows, before = torch.cat(data), layer.weight.detach().clone()
    hessian = rows.T @ rows
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    losses = []
    for start in range(0, 24, 4):
        inverse = torch.linalg.inv(torch.linalg.inv(hessian[start:, start:])[:4, :4])
        unit = before[:, start : start + 4]
        losses.append(((unit @ inverse) * unit).sum(1))
    prune(layer, "sparsegpt", 0.5, "vector:1x4", data=data)
    kept = patterns.Unstructured().mask(torch.stack(losses, dim=1), 0.5)
    assert torch.equal(layer.weight != 0, kept.repeat_interleave(4, dim=1))


@pytest.mark.parametrize(
    "pattern", ["unstructured", "2:4", "block:4x4", "block:3x3", "vector:1x4", "kernel"]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_sparsegpt_in_convolutions(pattern, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    data = [torch.randn(8, 8, 8, 8).cumsum(-1).cumsum(-2) for _ in range(2)]
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        pruned = copy.deepcopy(conv)
        report = prune(pruned, method, 0.5, pattern, "uniform", data=data)
        errors[method] = output_error(pruned, conv, data)
        assert patterns.parse(pattern).verify(pruned.weight)
        assert abs(report.sparsity - 0.5) < 0.02
    assert errors["sparsegpt"] < 0.9 * min(errors["wanda"], errors["magnitude"])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_more_knowledge_gives_less_error_on_correlated_inputs(pattern):
    data, dense, errors = correlated(), mlp(), []
    for method in ("sparsegpt", "wanda", "magnitude", "random"):
        model = mlp()
        prune(model, method, 0.5, pattern, "uniform", data=data)
        errors.append(output_error(model, dense, data))
    assert errors == sorted(errors) and errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("scope", ["global", "erk"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_totals_are_exact(method, scope):
    model = mlp()
    report = prune(model, method, 0.77, scope=scope, data=correlated())
    assert report.zeros == round(0.77 * report.total)
    assert all(0 < layer.sparsity < 1 for layer in report.layers)


def test_inputs_that_are_never_active_are_pruned_first():
    data = [x * torch.tensor([0.0, 1.0]).repeat(12) for x in correlated()]
    for method in ("wanda", "sparsegpt"):
        layer = nn.Linear(24, 10)
        assert prune(layer, method, 0.5, data=data).zeros == 120
        assert (layer.weight[:, ::2] == 0).all() and (layer.weight[:, 1::2] != 0).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_later_stages_see_pruned_inputs_unless_told_not_to(method):
    data = correlated()
    sequential, by_hand, parallel, dense = mlp(), mlp(), mlp(), mlp()
    prune(sequential, method, 0.5, data=data)
    prune(by_hand[0], method, 0.5, data=data)
    with torch.no_grad():
        inner = [by_hand[:2](x) for x in data]
    prune(by_hand[2], method, 0.5, data=inner)
    assert torch.equal(sequential[2].weight, by_hand[2].weight)
    prune(parallel, method, 0.5, data=data, sequential=False)
    with torch.no_grad():
        inner = [dense[:2](x) for x in data]
    prune(dense[2], method, 0.5, data=inner)
    assert torch.equal(parallel[2].weight, dense[2].weight)


def test_stages_end_early_and_go_block_by_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
            self.runs = 0

        def forward(self, x):
            self.runs += 1
            return self.second(self.first(x).relu())

    model = nn.ModuleDict({"layer": nn.Sequential(Block(), Block()), "head": nn.Linear(24, 4)})
    model.forward = lambda x: model["head"](model["layer"](x))
    prune(model, "wanda", data=correlated(1))
    # One run to find the order, then a run each for layer.0, layer.1 and head.
    assert [block.runs for block in model["layer"]] == [4, 3]


def test_forms_of_data_agree():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(24, 8)

        def forward(self, x, shift=0.0):
            return self.fc(input=x + shift)

    x = correlated(1)[0]
    shift, target = torch.zeros(1), torch.zeros(128)
    loader = DataLoader(TensorDataset(x, target), batch_size=64)
    forms = [[x], [(x, target)], [((x, shift), None)], [{"x": x}], [({"x": x, "shift": shift}, 1)]]
    forms += [loader, DataLoader(TensorDataset(x), batch_size=128), iter([x])]
    results = []
    for data in forms:
        model = Two()
        prune(model, "wanda", 0.5, data=data)
        results.append(model)
    assert all(same_weights(results[0], other) for other in results[1:])


def test_padding_does_not_count():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(24, 8)

        def forward(self, x, attention_mask):
            return self.fc(x)

    x = torch.stack(correlated(2, rows=10))
    valid = torch.arange(10).expand(2, 10) < torch.tensor([[4], [7]])
    model, other = Padded(), Padded()
    prune(model, "wanda", 0.5, data=[{"x": x, "attention_mask": valid.long()}])
    prune(other.fc, "wanda", 0.5, data=[x[valid]])
    assert same_weights(model, other)
    noisy = x.masked_fill(~valid[..., None], 1e3)
    model = Padded()
    prune(model, "wanda", 0.5, data=[{"x": noisy, "attention_mask": valid.long()}])
    assert same_weights(model, other)


def test_the_model_is_left_as_it_was_but_for_its_weights():
    model = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Dropout(), nn.Linear(24, 4))
    model[2].eval()
    flags = [m.training for m in model.modules()]
    mean = model[1].running_mean.clone()
    prune(model, "sparsegpt", data=correlated())
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(model[1].running_mean, mean)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_hessian_that_cannot_be_factored_is_named_and_the_model_put_back():
    model = mlp()
    with torch.no_grad():  # equal inputs of layer 4 make its Hessian singular
        model[2].weight[1] = model[2].weight[0]
        model[2].bias[:] = 5
    before, data, scope = copy.deepcopy(model), correlated(), {"0": 0.5, "4": 0.5}
    message = "positive definite Hessian in layer '4', got a Cholesky failure with percdamp=0; use"
    with pytest.raises(ValueError, match=message):
        prune(model, "sparsegpt", scope=scope, data=data, percdamp=0)
    assert same_weights(model, before)
    prune(model, "sparsegpt", scope=scope, data=data)
    assert [int((w == 0).sum()) for w in weights(model)] == [24 * 32 // 2, 0, 16 * 8 // 2]


def test_damping_that_is_too_little_is_raised_with_a_warning():
    x = correlated()
    for batch in x:
        batch[:, 1] = batch[:, 0]
    raised, wanted = nn.Linear(24, 8), nn.Linear(24, 8)
    wanted.load_state_dict(raised.state_dict())
    with pytest.warns(UserWarning, match="got a Cholesky failure.*; trying percdamp=") as w:
        prune(raised, "sparsegpt", 0.5, data=x, percdamp=1e-10)
    last = float(str(w[-1].message).rpartition("=")[2])
    assert 1e-9 <= last <= 1e-4 and len(w) == round(math.log10(last / 1e-10))
    prune(wanted, "sparsegpt", 0.5, data=x, percdamp=last)
    torch.testing.assert_close(raised.weight, wanted.weight)


def test_layers_without_data_are_named_and_the_model_put_back():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.used(x)

    model = Skips()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"to reach layer .unused., got no call of it .no bat"):
        owl(model, correlated(), 0.5)
    assert same_weights(model, before)
    assert prune(model, "wanda", data=correlated(), ignore="unused").zeros == 518
    for method in ("wanda", "sparsegpt", "refit"):
        model = copy.deepcopy(before)
        report = prune(model, method, 0.5, data=correlated(), scope="uniform")
        used, unused = report.layers
        assert not used.note and unused.note == "pruned by magnitude, as no batch reaches it"
        assert unused.note in str(report) and used.zeros == unused.zeros == 288
        kept = before.unused.weight.abs()[model.unused.weight != 0]
        assert method != "sparsegpt" or kept.min() >= before.unused.weight.abs().median()


def test_inputs_that_are_not_finite_are_refused():
    data = correlated()
    data[1][3, 3] = torch.nan
    with pytest.raises(ValueError, match="expected finite inputs of layer '0', got NaN or Inf"):
        prune(mlp(), "wanda", data=data)


def test_a_failing_forward_puts_the_model_back():
    model, data = mlp(), correlated()
    with pytest.raises(RuntimeError):
        prune(model, "wanda", data=[*data, torch.ones(3, 5)])
    assert same_weights(model, mlp())
