"""Forwards that do or read more than steps can: they run as written, and nothing is touched."""

import copy
import pickle
import random

import pytest
import torch
from fuse_common import forced, fused, prepared
from torch import nn

import sparsekern as sk
from sparsekern.blocks import FusedBlock

X = torch.randn(2, 6, 8, 8)
LOG, COUNTS, FACTOR = [], {"calls": 0}, 1.0


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    forced(monkeypatch)


class Meter:
    def __init__(self):
        self.calls, self.last = 0, None

    def note(self, x):
        self.calls, self.last = self.calls + 1, x


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.relu(x)


class Block(nn.Module):
    """A residual block that calls `how` in between."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.how, self.calls, self.counts, self.history = how, 0, {"calls": 0}, [0]
        self.meter, self.kept, self.alpha = Meter(), None, 1.0
        self.callback = LOG.append
        self.parts = nn.ModuleList([Counting()])

    def forward(self, x):
        return self.alpha * x + self.b(torch.relu(self.how(self, self.a(x))))


def counts(m, y):
    m.calls += 1
    return y


def counts_in_a_dict(m, y):
    m.counts["calls"] += 1
    return y


def counts_in_a_list(m, y):
    m.history[0] += 1
    return y


def keeps(m, y):
    m.kept = y
    return y


def keeps_in_a_list(m, y):
    m.history.append(y)
    return y


def keeps_in_a_global(m, y):
    LOG.append(y)
    return y


def counts_in_a_global(m, y):
    COUNTS["calls"] += 1
    return y


def meters(m, y):
    m.meter.note(y)
    return y


def calls_back(m, y):
    m.callback(y)
    return y


def counts_in_a_list_of_modules(m, y):
    return m.parts[0](y)


def seen_of(block):
    """What the forwards above leave behind."""
    kept = block.kept if isinstance(block.kept, torch.Tensor) else None
    numbers = [block.calls, block.counts["calls"], block.history[0], len(block.history), len(LOG)]
    return [*numbers, COUNTS["calls"], block.meter.calls, block.parts[0].calls], kept


@pytest.mark.parametrize(
    "how",
    [
        counts, counts_in_a_dict, counts_in_a_list, keeps, keeps_in_a_list, keeps_in_a_global,
        counts_in_a_global, meters, calls_back, counts_in_a_list_of_modules,
    ],
)  # fmt: skip
def test_what_a_forward_does_besides_goes_on(how):
    LOG.clear()
    model = prepared(nn.Sequential(Block(how), nn.Identity()), 0.5)
    assert not fused(model, X).residuals
    assert all(type(entry) in (int, torch.Tensor) for entry in [*LOG, *model[0].history])
    assert type(model[0].meter.last) in (type(None), torch.Tensor)
    before, _ = seen_of(model[0])
    model(X)
    after, kept = seen_of(model[0])
    assert sum(after) == sum(before) + (how is not keeps)
    if how is keeps:
        torch.testing.assert_close(kept, model[0].a(X))


def draws(m, y):
    return y if random.random() < 2 else -y


def speaks(m, y):
    print("here")
    return y


def switches_autocast(m, y):
    with torch.autocast("cpu", torch.bfloat16):
        return m.b(y).float()


@pytest.mark.parametrize("how", [draws, speaks, switches_autocast])
def test_what_differs_from_call_to_call_is_not_traced(how):
    model = prepared(nn.Sequential(Block(how), nn.Identity()), 0.5)
    assert not sk.report(sk.convert_to_sparse(model, X, cache=False)).residuals


def asks_for_autocast(m, y):
    return -y if torch.is_autocast_enabled("cpu") else y


def reads_a_global(m, y):
    return y * FACTOR


def reads_what_may_be_missing(m, y):
    return y * getattr(m, "extra", 1.0)


def changed(model, monkeypatch, what):
    if what == "alpha":
        model[0].alpha = torch.full((6, 1, 1), 3.0) if model[0].alpha == 2.0 else 2.0
    elif what == "extra":
        model[0].extra = 2.0
    else:
        monkeypatch.setitem(globals(), "FACTOR", 2.0)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (lambda m, y: y, "alpha"),
        (reads_what_may_be_missing, "extra"),
        (reads_a_global, "FACTOR"),
    ],
)
def test_settings_that_change_later_count(how, what, monkeypatch):
    model = prepared(nn.Sequential(Block(how), nn.Identity()), 0.5)
    plain = copy.deepcopy(model)
    assert fused(model, X).residuals == ["0"]
    twin = copy.deepcopy(model)
    for _ in range(2):
        for one in (model, plain, twin):
            changed(one, monkeypatch, what)
        for one in (model, twin):
            torch.testing.assert_close(one(X), plain(X), rtol=1e-4, atol=1e-5)


class Config:
    def __init__(self):
        self.scale, self.inner = 1.0, Meter()


def reads_a_config(m, y):
    return y * m.config.scale + m.config.inner.calls + getattr(m.config, "shift", 0.0)


def change_config(model, what):
    config = model[0].config
    if what == "scale":
        config.scale += 1
    elif what == "inner":
        config.inner.calls += 1
    elif what == "shift":
        config.shift = 2.0
    else:
        model[0].config = Config()
        model[0].config.scale = 3.0


def with_config(how):
    model = nn.Sequential(Block(how), nn.Identity())
    model[0].config = Config()
    return prepared(model, 0.5)


@pytest.mark.parametrize("what", ["scale", "inner", "shift", "config"])
def test_objects_of_settings_are_read_and_their_changes_count(what):
    model = with_config(reads_a_config)
    plain = copy.deepcopy(model)
    assert fused(model, X).residuals == ["0"]
    twin = copy.deepcopy(model)
    for _ in range(2):
        for one in (model, twin):
            torch.testing.assert_close(one(X), plain(X), rtol=1e-4, atol=1e-5)
        for one in (model, plain, twin):
            change_config(one, what)


def writes_a_config(m, y):
    m.config.scale = 2.0
    return y


def calls_a_config(m, y):
    m.config.inner.note(y)
    return y


@pytest.mark.parametrize("how", [writes_a_config, calls_a_config])
def test_objects_that_a_forward_changes_are_left_alone(how):
    model = with_config(how)
    assert fused(model, X).residuals == []
    assert model[0].config.scale == 1.0 or how is writes_a_config


def test_autocast_that_is_asked_for():
    model = prepared(nn.Sequential(Block(asks_for_autocast), nn.Identity()), 0.5)
    assert fused(model, X).residuals == ["0"]
    with torch.autocast("cpu", torch.bfloat16):
        want = type(model[0]).forward(model[0], X)
        assert torch.equal(model(X), want)


def test_activations_that_do_more_are_not_fused():
    model = prepared(nn.Sequential(nn.Conv2d(6, 6, 3), Counting()), 0.5)
    assert not fused(model, X).fused
    before = model[1].calls
    model(X)
    assert model[1].calls == before + 1


def test_classes_that_keep_account_of_theirs_are_left_alone():
    known = []

    class Registered(Block):
        def __init_subclass__(cls):
            known.append(cls)

    model = prepared(nn.Sequential(Registered(lambda m, y: y), nn.Identity()), 0.5)
    assert not fused(model, X).residuals and not known


def test_fused_blocks_with_settings_are_pickled():
    model = prepared(nn.Sequential(Block(reads_a_global), nn.Identity()), 0.5)
    fused(model, X)
    del model[0].callback
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again[0].forward, FusedBlock)
    torch.testing.assert_close(again(X), model(X))
    again[0].alpha = 5.0
    torch.testing.assert_close(again(X), type(again[0]).forward(again[0], X))
    assert isinstance(sk.to_dense(again)[0].a, nn.Conv2d)


def test_models_with_fused_blocks_are_traced_by_fx():
    model = prepared(nn.Sequential(Block(lambda m, y: y), nn.Identity()), 0.5)
    assert fused(model, X).residuals == ["0"]
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), model(X))
