"""Dead neurons and permuted channels: what follows channels through the graph of a model."""

import copy
import itertools

import pytest
import torch
from pruner_common import one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern import patterns
from sparsekern.prune import permute_channels, prune, remove_dead_neurons
from sparsekern.prune.links import find_sources
from sparsekern.prune.permute import best_order


class Net(nn.Module):
    """Functions, a branch, a residual sum and a convolution that pads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3)
        self.padded = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Linear(8 * 4, 16)
        self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(F.leaky_relu(self.second(x), 0.2), 2)
        x = torch.flatten(self.padded(x).relu(), 1)
        x = self.drop(torch.tanh(self.wide(x)))
        return self.left(x) + self.right(x)


def net():
    model = Net().double().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.bias.normal_()
    return model


IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mlp(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_channels_are_followed_to_all_their_readers():
    found = {s.name: [link.name for link in s.links] for s in find_sources("x", Net())}
    assert found == {
        "first": ["second"], "second": ["padded"], "padded": ["wide"], "wide": ["left", "right"]
    }  # fmt: skip
    sources = {s.name: s for s in find_sources("x", Net())}
    assert sources["padded"].links[0].positions == 4
    assert [link.pads_with_zeros for s in sources.values() for link in s.links] == [
        False, True, False, False, False
    ]  # fmt: skip


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        if kind == "tied":
            self.c.weight = self.a.weight
        if kind == "hooked":
            self.a.register_forward_hook(lambda module, inputs, output: output.flip(-1))

    def forward(self, x):
        if self.kind == "residual":
            return self.b(x + self.a(x))
        if self.kind == "output":
            y = self.a(x)
            return self.b(y), y
        if self.kind == "twice":
            return self.b(self.a(self.a(x)))
        if self.kind == "read":
            return self.b(self.a(x)) + F.linear(x, self.a.weight)
        if self.kind == "norm":
            return self.b(self.norm(self.a(x)))
        if self.kind == "in place":
            y = self.a(x)
            return self.b(F.relu(y, inplace=True)) + self.c(y)
        if self.kind == "pool":
            return self.b(F.max_pool1d(self.a(x), 3, 1, 1))
        return self.b(self.a(x))


@pytest.mark.parametrize(
    "kind",
    ["residual", "output", "twice", "read", "norm", "in place", "pool", "tied", "hooked"],
)
def test_what_cannot_be_followed_is_left_alone(kind):
    assert find_sources("x", Odd("plain"))[0].name == "a"
    assert find_sources("x", Odd(kind)) == []


def test_dead_neurons_by_hand():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [0, 0], [3, 4]]))
        model[0].bias.copy_(torch.tensor([1.0, 5, 7]))
        model[2].weight.copy_(torch.tensor([[1.0, 2, 0], [3, 4, 0]]))
        model[2].bias.copy_(torch.tensor([10.0, 20]))
    result = remove_dead_neurons(model)
    assert model[0].weight.tolist() == [[1, 2], [0, 0], [0, 0]]
    assert model[0].bias.tolist() == [1, 0, 0]
    assert model[2].weight.tolist() == [[1, 0, 0], [3, 0, 0]]
    assert model[2].bias.tolist() == [10 + 2 * 5, 20 + 4 * 5]
    assert (result.without_inputs, result.without_outputs, result.left) == ({"0": 1}, {"0": 1}, {})


def test_dead_neurons_leave_the_outputs_as_they_are():
    model = net()
    with torch.no_grad():
        model.first.weight[2] = 0
        model.second.weight[:2] = 0  # behind it a zero border: only constants 0 can go
        model.second.bias[0], model.second.bias[1] = 0, 0.5
        model.padded.weight[5] = 0
        model.wide.weight[3] = 0  # one reader has no bias
        model.wide.bias[4], model.wide.weight[4] = 0, 0
        model.left.weight[:, 7] = 0
        model.right.weight[:, 7] = 0
    wanted = model(IMAGES)
    result = remove_dead_neurons(model)
    torch.testing.assert_close(model(IMAGES), wanted)
    assert result.without_inputs == {"first": 1, "second": 1, "padded": 1, "wide": 1}
    assert result.without_outputs == {"wide": 1}
    assert result.left == {
        "second": "1: 'padded' pads its input with zeros", "wide": "1: 'right' has no bias"
    }  # fmt: skip
    assert not model.second.weight[:, 2].any() and not model.padded.weight[:, 0].any()
    assert not model.wide.weight[:, 20:24].any() and not model.wide.weight[7].any()
    again = remove_dead_neurons(model)
    assert not again.without_inputs and not again.without_outputs and again.left == result.left


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.GELU(), nn.Sigmoid(), nn.Tanh()])
def test_death_spreads_forwards_and_backwards(act):
    model = mlp(act, nn.BatchNorm1d(8), nn.Dropout()).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    model(x)  # statistics
    model.eval()
    with torch.no_grad():
        model[0].weight[0], model[4].weight[1, 1:], model[6].weight[:, 2] = 0, 0, 0
        model[4].weight[3:, 3] = 0
        model[4].weight[:2, 3] = 0  # only unit 2 reads unit 3, and nobody reads unit 2
    wanted = model(x)
    result = remove_dead_neurons(model)
    torch.testing.assert_close(model(x), wanted)
    assert result.without_inputs == {"0": 1, "4": 1}  # unit 1 lived from unit 0 alone
    assert result.without_outputs == {"0": 1, "4": 1}
    assert not model[0].weight[3].any() and not model[6].weight[:, 1].any()


def test_dead_neurons_stay_dead_under_a_pruner_and_convert():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = sk.Pruner(model, optimizer, sparsity=0.97, scope="uniform")
    result = remove_dead_neurons(model)
    assert result.without_inputs["0"] > 1 and result.without_outputs["0"] > 5
    zeros = [model[i].weight == 0 for i in (0, 2)]
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(torch.randn(16, 32)), torch.randn(16, 8)).backward()
        optimizer.step()
        pruner.step()
    assert all(bool((model[i].weight[z] == 0).all()) for i, z in zip((0, 2), zeros))
    assert pruner.finalize().sparsity > 0.97
    x = torch.randn(4, 32)
    wanted = model.eval()(x)
    torch.testing.assert_close(sk.convert_to_sparse(model)(x), wanted)


def test_dead_neurons_of_channels_last_and_half_precision_and_ignored_layers():
    model = net().to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.first.weight[2] = 0
    wanted = model(IMAGES)
    assert remove_dead_neurons(model).without_inputs == {"first": 1}
    torch.testing.assert_close(model(IMAGES), wanted)
    assert not model.second.weight[:, 2].any()
    half = mlp(nn.ReLU()).bfloat16()
    with torch.no_grad():
        half[0].weight[1] = 0
    assert remove_dead_neurons(copy.deepcopy(half), ignore="0").without_inputs == {}
    assert remove_dead_neurons(half).without_inputs == {"0": 1}


def kept(scores, n, m):
    return scores.unflatten(1, (-1, m)).sort(2, descending=True).values[:, :, :n].sum().item()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_best_order_keeps_more_and_a_single_swap_no_longer_helps(n, m):
    generator = torch.Generator().manual_seed(n + m)
    scores = torch.rand(12, 4 * m, generator=generator, dtype=torch.float64) ** 3
    order = best_order(scores, n, m, 100)
    assert sorted(order.tolist()) == list(range(4 * m))
    found = kept(scores[:, order], n, m)
    assert found > kept(scores, n, m)
    for a, b in itertools.combinations(range(4 * m), 2):
        other = order.clone()
        other[[a, b]] = other[[b, a]]
        assert kept(scores[:, other], n, m) <= found + 1e-6
    assert torch.equal(best_order(scores[:, order], n, m, 100), torch.arange(4 * m))
    assert kept(scores[:, best_order(scores, n, m, 1)], n, m) > kept(scores, n, m)


def test_best_order_against_all_partitions():
    ratios = []
    for seed in range(5):
        scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)).double()
        best = max(
            kept(scores[:, [0, *rest, *(c for c in range(1, 8) if c not in rest)]], 2, 4)
            for rest in itertools.combinations(range(1, 8), 3)
        )
        ratios.append(kept(scores[:, best_order(scores, 2, 4, 100)], 2, 4) / best)
    assert all(0.97 < ratio <= 1 + 1e-12 for ratio in ratios) and max(ratios) > 1 - 1e-12


def test_escapes_reach_the_best_partition_where_greedy_swaps_do_not():
    """Against all partitions of 12 columns into three groups of 4 (5,775 of them)."""

    def partitions(columns):
        if not columns:
            yield []
            return
        for rest in itertools.combinations(columns[1:], 3):
            left = [c for c in columns[1:] if c not in rest]
            for others in partitions(left):
                yield [columns[0], *rest, *others]

    orders = torch.tensor(list(partitions(list(range(12)))))
    assert len(orders) == 5775
    plain, escaped = [], []
    for seed in range(6):
        scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(seed)).double() ** 2
        best = float(scores[:, orders].unflatten(2, (-1, 4)).topk(2, 3).values.sum((0, 2, 3)).max())
        for escapes, found in ((0, plain), (100, escaped)):
            order = best_order(scores, 2, 4, 100, escapes)
            assert sorted(order.tolist()) == list(range(12))
            found.append(kept(scores[:, order], 2, 4) / best)
        assert torch.equal(order, best_order(scores, 2, 4, 100, 100))  # draws from its own seed
    assert min(escaped) > 1 - 1e-12 and max(escaped) < 1 + 1e-12 and min(plain) < 0.999
    assert all(a <= b for a, b in zip(plain, escaped))


def test_escapes_with_a_single_group_and_other_sizes():
    scores = torch.rand(5, 4, dtype=torch.float64)
    assert torch.equal(best_order(scores, 2, 4, 10, 10), torch.arange(4))
    scores = torch.rand(8, 32, dtype=torch.float64) ** 3
    found = [kept(scores[:, best_order(scores, 3, 8, 100, n)], 3, 8) for n in (0, 5, 50)]
    assert found == sorted(found) and found[2] > found[0]


def test_permuted_channels_compute_the_same_and_lose_less():
    model, plain = net(), net()
    wanted = model(IMAGES)
    result = permute_channels(model)
    torch.testing.assert_close(model(IMAGES), wanted)
    # "padded" is read behind a flatten of 2 x 2 positions.
    assert list(result) == ["first", "second", "wide"]
    assert all(0.5 < before < after < 1 for before, after in result.values())
    for name in ("second", "padded"):
        old, new = (m.get_submodule(name).weight.detach() for m in (plain, model))
        mask = patterns.parse("2:4").mask
        assert (new * mask(new.abs())).abs().sum() > (old * mask(old.abs())).abs().sum()
    assert not torch.equal(model.norm.running_mean, plain.norm.running_mean)
    ignored = net()
    assert list(permute_channels(ignored, "1:4", 3, ignore="first")) == ["second", "wide"]
    assert torch.equal(ignored.first.weight, plain.first.weight)
    prune(model, pattern="2:4", ignore="first")


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            permute_channels,
            {"pattern": "unstructured"},
            "expected an N:M pattern, got unstructured",
        ),
        (
            permute_channels,
            {"pattern": "2:4T"},
            "permute_channels: expected an N:M pattern, got 2:4T",
        ),
        (permute_channels, {"rounds": 0}, "expected rounds to be an int >= 1, got 0"),
        (permute_channels, {"escapes": -1}, "expected escapes to be an int >= 0, got -1"),
        (permute_channels, {"ignore": "x"}, "expected ignore to match a module, got 'x'"),
        (remove_dead_neurons, {"ignore": "x"}, "expected ignore to match a module, got 'x'"),
    ],
)
def test_bad_values(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(net(), **options)


def test_bad_models():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    for function in (permute_channels, remove_dead_neurons):
        where = function.__name__
        with pytest.raises(TypeError, match=f"{where}: expected a torch.nn.Module, got list"):
            function([])
        with pytest.raises(ValueError, match=f"{where}: expected a model that torch.fx can trace"):
            function(Branch())
    model = net()
    sk.Pruner(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="a model without masks, got one on layer 'first'"):
        permute_channels(model)
