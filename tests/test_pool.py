"""Max pools that run by way of channels_last after a conversion."""

import copy

import pytest
import torch
from fuse_common import forced
from torch import nn

import sparsekern as sk
from sparsekern import pool
from sparsekern.pool import ChannelsLastMaxPool2d


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1, **options)
        self.conv.weight.data[:, 1:] = 0

    def forward(self, x):
        y = self.pool(self.conv(x))
        return y[0] if isinstance(y, tuple) else y


@pytest.fixture
def x():
    return torch.randn(2, 3, 13, 17, generator=torch.Generator().manual_seed(0))


def convert(monkeypatch, model, x, gain=2.0):
    monkeypatch.setattr(pool, "_gain", lambda *_: gain)
    forced(monkeypatch)
    return sk.convert_to_sparse(model.eval(), x, cache=False)


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"ceil_mode": True}], ids=str)
def test_same_values_and_layout(monkeypatch, x, options):
    model = Net(**options).eval()
    want = model(x)
    converted = convert(monkeypatch, copy.deepcopy(model), x)
    assert type(converted.pool) is ChannelsLastMaxPool2d
    got = converted(x)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want)
    assert sk.report(converted).pools == ["pool"]
    assert "1 max pools in channels_last: pool" in str(sk.report(converted))


def test_to_dense_brings_the_module_back(monkeypatch, x):
    model = Net()
    plain = model.pool
    converted = convert(monkeypatch, model, x)
    copied = sk.to_dense(copy.deepcopy(converted))
    assert type(copied.pool) is nn.MaxPool2d
    assert sk.to_dense(converted).pool is plain


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_slower_pools_stay(monkeypatch, x, gain):
    assert type(convert(monkeypatch, Net(), x, gain).pool) is nn.MaxPool2d


def test_pools_that_stay(monkeypatch, x):
    assert type(convert(monkeypatch, Net(return_indices=True), x).pool) is nn.MaxPool2d
    hooked = Net()
    hooked.pool.register_forward_hook(lambda *_: None)
    assert type(convert(monkeypatch, hooked, x).pool) is nn.MaxPool2d
    monkeypatch.setattr(pool, "_gain", lambda *_: 2.0)
    off = sk.convert_to_sparse(Net().eval(), x, cache=False, fuse=False)
    assert type(off.pool) is nn.MaxPool2d


@pytest.mark.parametrize("training", [False, True])
def test_gain_is_measured(x, training):
    plain = nn.MaxPool2d(2)
    twin = copy.copy(plain)
    twin.__class__ = ChannelsLastMaxPool2d
    spec = sk.tune.InputSpec.of(x)
    assert 0 < pool._gain(plain, twin, spec, 0.01, training) < 1e3
