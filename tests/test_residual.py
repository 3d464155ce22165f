"""Residual sums that convolutions add: which, what comes out, and the way back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fuse_common import forced, fused, prepared
from torch import nn

import sparsekern as sk
from sparsekern.blocks import FusedBlock


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    forced(monkeypatch)


class Block(nn.Module):
    """As in a ResNet: one ReLU for all places, a shortcut, a sum in place."""

    def __init__(self, inputs=6, outputs=6, stride=1):
        super().__init__()
        self.a, self.na = nn.Conv2d(inputs, 8, 3, stride, 1, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.relu(self.na(self.a(x)))
        y = self.nb(self.b(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        y += x
        return self.relu(y)


class Variant(nn.Module):
    """A convolution and a sum that is written in another way."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.other, self.act = (
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
            nn.ReLU6(),
        )
        self.how = forward

    def forward(self, x):
        return self.how(self, x)


def net(*blocks):
    return prepared(nn.Sequential(*blocks), 0.5)


def blocks_of(model, x=None):
    x = torch.randn(2, 6, 9, 9) if x is None else x
    return fused(model, x).residuals


def test_blocks_of_a_resnet():
    model, x = net(Block(), Block(6, 10, 2), Block(10, 10)), torch.randn(2, 6, 9, 9)
    report = fused(model, x)
    assert report.residuals == ["0", "1", "2"]
    assert "3 blocks add residuals in convolutions: 0, 1, 2" in str(report)
    assert isinstance(model[1].forward, FusedBlock) and isinstance(model[1], Block)
    assert "forward" not in model.__dict__


def in_place_on_the_other_term(m, x):
    other = m.other(x) * 2
    other += m.conv(x)
    return other


def in_place_on_the_input(m, x):
    x = m.act(x)
    return x.add_(m.conv(x))


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: m.conv(x) + x,
        lambda m, x: x + m.conv(x),
        lambda m, x: torch.add(x, m.conv(x)),
        lambda m, x: F.relu(m.conv(x).add(x), inplace=True),
        lambda m, x: m.act(m.other(x) + m.conv(x)),
        lambda m, x: m.act(m.conv(x).add_(m.other(x))),
        lambda m, x: (m.conv(x) + x).relu() * 2,
        lambda m, x: F.silu(m.conv(x) + x),
        in_place_on_the_other_term,
    ],
)
def test_sums_in_other_words(how):
    assert blocks_of(net(Variant(how), nn.Identity())) == ["0"]


def read_twice(m, x):
    y = m.conv(x)
    return (y + x) * y


def something_in_between(m, x):
    y = m.conv(x)
    x = torch.relu_(x.clone())
    return y + x


@pytest.mark.parametrize(
    "how",
    [
        in_place_on_the_input,
        read_twice,
        something_in_between,
        lambda m, x: torch.add(x, m.conv(x), alpha=2),
        lambda m, x: m.conv(x) + x.mean((2, 3), keepdim=True),  # of another shape
        lambda m, x: m.conv(x) + 1,
        lambda m, x: m.conv(x) * x,
        lambda m, x: m.conv(x) + x if x.sum() > 0 else x,  # cannot be traced
        lambda m, x: m.other(F.relu(m.conv(x))),
    ],
)
def test_what_stays_as_it_is(how):
    assert blocks_of(net(Variant(how), nn.Identity())) == []


def test_a_block_that_changes_its_input_stays():
    def change(m, x):
        x += m.conv(x)
        return x

    assert blocks_of(net(nn.Conv2d(6, 6, 1), Variant(change))) == []


def test_a_block_called_by_keyword_stays():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x=x)

    assert blocks_of(net(Outer(), nn.Identity())) == []


def test_a_block_with_hooks_inside_stays():
    model = net(Block(), Block())
    seen = []
    model[0].shortcut = nn.Sequential().eval()
    model[0].shortcut.register_forward_hook(lambda *_: seen.append(1))
    assert blocks_of(model) == ["1"] and seen


def test_an_outer_block_keeps_the_forward_of_an_inner_one():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.conv = Block(), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            return self.conv(self.inner(x)) + x

    assert blocks_of(net(Outer(), nn.Identity())) == ["0.inner"]


def test_training_mode_runs_the_block_as_it_was_written():
    model, x = net(Block(), Block()), torch.randn(2, 6, 9, 9)
    fused(model, x)
    want = model(x)
    model.train()
    torch.testing.assert_close(model(x), want)  # normalisations are folded: nothing else differs
    model(x).sum().backward()
    assert model[0].b.weight.values.grad is not None


def test_copies_and_pickles():
    model, x = net(Block(), Block(6, 4)), torch.randn(2, 6, 9, 9)
    fused(model, x)
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].forward.block is other[0]
        with torch.no_grad():
            model[0].b.weight.values.mul_(2)  # no copy reads the weights of the model
        torch.testing.assert_close(other(x), want)
        with torch.no_grad():
            model[0].b.weight.values.mul_(0.5)


def test_back_to_dense():
    model, x = net(Block(), Block(6, 4)), torch.randn(2, 6, 9, 9)
    fused(model, x)
    want = model(x)
    sk.to_dense(model)
    assert "forward" not in model[0].__dict__
    assert not any(isinstance(m, (sk.SparseConv2d, FusedBlock)) for m in model.modules())
    torch.testing.assert_close(model(x), want)


def test_a_model_that_lost_gets_its_forwards_back(monkeypatch):
    forced(monkeypatch, whole=0.5)
    model = net(Block(), Block())
    report = fused(model, torch.randn(2, 6, 9, 9))
    assert report.reverted and "forward" not in model[0].__dict__


def test_compiles_whole_and_exports():
    model, x = net(Block(), Block(6, 4)), torch.randn(2, 6, 9, 9)
    fused(model, x)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)


def test_nothing_without_fusion_or_for_training():
    for options in ({"fuse": False}, {"mode": "training"}):
        model = net(Block(), Block())
        assert fused(model, torch.randn(2, 6, 9, 9), **options).residuals == []


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2", "2:4"])
def test_layer_with_a_residual(pattern):
    sparsity = None if pattern == "2:4" else 0.5
    layer = sk.SparseConv2d(
        8, 6, 3, padding=1, sparsity=sparsity, pattern=pattern, activation="relu"
    )
    x, more = torch.randn(2, 8, 7, 5), torch.randn(2, 6, 7, 5, requires_grad=True)
    plain = layer.to_dense()[0]
    torch.testing.assert_close(layer(x, more), F.relu(plain(x) + more))
    torch.testing.assert_close(layer(x, more, "none"), plain(x) + more)
    torch.testing.assert_close(layer(x[0], more[0]), F.relu(plain(x[0]) + more[0]))
    (got,) = torch.autograd.grad(layer(x, more).sum(), more)
    torch.testing.assert_close(got, (plain(x) + more > 0).float())
    with pytest.raises(RuntimeError, match=r"conv2d: expected residual"):
        layer(x, more[:, :3])


def test_a_gpu_adds_the_residual_to_what_its_convolution_gives(monkeypatch):
    from sparsekern.ops import csr_conv_cuda

    monkeypatch.setattr(csr_conv_cuda, "_conv", lambda *args: (args[12:], torch.ones(2)))
    assert csr_conv_cuda._conv_residual(*range(12), "relu6")[0] == ("relu6",)
    assert csr_conv_cuda._conv_residual(*range(12))[0] == ("none",)
    monkeypatch.setattr(csr_conv_cuda, "_conv", lambda *args: torch.ones(2))
    y = csr_conv_cuda._conv_residual(*range(12), "relu", torch.tensor([1.0, -3.0]))
    assert y.tolist() == [2.0, 0.0]
