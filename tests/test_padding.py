"""Zeros around an image that the convolution adds: which, what comes out, and the way back."""

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


class Padded(nn.Module):
    """A convolution behind a padding that is written in some way."""

    def __init__(self, pad, kernel=3, stride=2, groups=1, **options):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, kernel, stride, groups=groups, **options)
        self.other, self.zeros = nn.Conv2d(6, 6, 1), nn.ZeroPad2d((0, 1, 2, 1))
        self.pad = pad

    def forward(self, x):
        return self.other(self.conv(self.pad(self, x)))


def same(m, x):
    """Padding as TensorFlow does it, which computes with sizes."""
    height, width = x.shape[-2:]
    down = max((-(-height // 2) - 1) * 2 + 3 - height, 0)
    across = max((-(-int(width) // 2) - 1) * 2 + 3 - x.size(3), 0)
    if not x.dim() == x.ndim == len(x.size()):  # what pytest makes of an assert reads its state
        raise AssertionError
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))


def net(*blocks):
    return prepared(nn.Sequential(*blocks), 0.5)


IMAGE = (2, 6, 10, 9)


@pytest.mark.parametrize(
    "pad",
    [
        same,
        lambda m, x: F.pad(x, (0, 1, 0, 1)),
        lambda m, x: F.pad(x, (2, 1)),
        lambda m, x: F.pad(input=x, pad=[1, 1, 1, 1], mode="constant", value=0.0),
        lambda m, x: F.pad(x, (0, 0, 0, 0), "constant", 0),
        lambda m, x: m.zeros(x),
        lambda m, x: F.pad(torch.relu(x), (0, 1, 0, 1)),
        lambda m, x: F.pad(x[..., : x.shape[-1] - 2, :], (0, 1, 0, 1)),
    ],
)
@pytest.mark.parametrize("groups", [1, 6])
def test_zeros_in_many_words(pad, groups):
    model = net(Padded(pad, groups=groups), nn.Identity())
    report = fused(model, torch.randn(IMAGE))
    assert report.pads == ["0"] and not report.residuals
    assert "1 blocks pad in convolutions: 0" in str(report)
    assert all(step.target is not F.pad for step in model[0].forward.steps)


def read_twice(m, x):
    padded = F.pad(x, (0, 1, 0, 1))
    m.seen = padded.sum()
    return padded


@pytest.mark.parametrize(
    ("pad", "options"),
    [
        (lambda m, x: F.pad(x, (1, 1, 1, 1), "reflect"), {}),
        (lambda m, x: F.pad(x, (1, 1, 1, 1), value=1.0), {}),
        (lambda m, x: F.pad(x, (-1, 0, 1, 0)), {}),
        (lambda m, x: F.pad(x, (1, 1, 1, 1, 0, 0)), {}),
        (lambda m, x: F.pad(x, (1, 1, 1, 1)) * 2, {}),
        (read_twice, {}),
        (lambda m, x: F.pad(x, (0, x.shape[0], 0, 1)), {}),  # the number of images
        (lambda m, x: F.pad(x, (0, len([n for n in x.shape]), 0, 1)), {}),
        (lambda m, x: F.pad(x, (0, 1, 0, 1) if x.sum() > 0 else (1, 0, 1, 0)), {}),
        (lambda m, x: F.pad(x, (0, 1, 0, 1)), {"padding": 1, "padding_mode": "circular"}),
    ],
)
def test_what_stays_as_it_is(pad, options):
    assert fused(net(Padded(pad, **options), nn.Identity()), torch.randn(IMAGE)).pads == []


def test_a_dense_convolution_keeps_its_zeros_but_not_a_copy(monkeypatch):
    forced(monkeypatch, sparse=lambda layer: layer.kernel_size == (1, 1))
    for pads, want in (((0, 0, 0, 0), ["0"]), ((0, 1, 0, 1), [])):
        model = net(Padded(lambda m, x, pads=pads: F.pad(x, pads)), nn.Identity())
        assert fused(model, torch.randn(IMAGE)).pads == want


def test_a_block_that_adds_and_pads():
    class Inverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.expand, self.back = nn.Conv2d(6, 12, 1), nn.Conv2d(12, 6, 1)
            self.depthwise = nn.Conv2d(12, 12, 3, groups=12)

        def forward(self, x):
            y = self.expand(F.pad(x, (0, 0, 0, 0)))
            y = self.back(self.depthwise(F.pad(y, [x.shape[-1] // x.shape[-1]] * 4)))
            return x + y

    report = fused(net(Inverted(), Inverted()), torch.randn(2, 6, 10, 9))
    assert report.pads == report.residuals == ["0", "1"]


def test_other_sizes_run_as_written():
    model = net(Padded(same), nn.Identity())
    plain = copy.deepcopy(model)
    fused(model, torch.randn(IMAGE))
    assert model[0].forward.size == IMAGE[1:]
    for size in (IMAGE, (5, 6, 10, 9), (1, 6, 11, 9), (2, 6, 7, 12)):
        x = torch.randn(size)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


def test_copies_pickles_gradients_and_the_way_back():
    model, x = net(Padded(lambda m, x: m.zeros(x)), nn.Identity()), torch.randn(IMAGE)
    model[0].pad = second_of_two
    plain = copy.deepcopy(model)
    fused(model, x)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[0].forward, FusedBlock)
        grads = []
        for one in (other, plain):
            leaf = x.clone().requires_grad_()
            one(leaf).square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)
    assert "forward" not in sk.to_dense(model)[0].__dict__
    torch.testing.assert_close(model(x), plain(x))


def second_of_two(m, x):
    """A function that can be pickled."""
    return F.pad(x, (0, 1, 0, 1))


def test_the_forward_compiles():
    model, x = net(Padded(same), nn.Identity()), torch.randn(IMAGE)
    fused(model, x)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("pads", [(0, 1, 0, 1), (1, 1, 2, 2), (0, 0, 0, 0), (3, 0, 0, 2)])
def test_zeros_given_to_a_layer(pads, mode):
    conv = nn.Conv2d(4, 6, 3, 2, (1, 0), padding_mode=mode)
    layer = sk.SparseConv2d.from_dense(conv, sparsity=0.5)
    x = torch.randn(2, 4, 9, 12)
    want = layer.to_dense()(F.pad(x, pads))
    torch.testing.assert_close(layer(x, pads=pads), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[0], pads=pads), want[0], rtol=1e-5, atol=1e-5)
