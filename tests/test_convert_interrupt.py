"""Ctrl-C at any point of a conversion: the model is as it was."""

import random
import sys
from pathlib import Path

import pytest
import torch
from convert_common import forced
from fuse_common import prepared
from torch import nn

import sparsekern as sk
from sparsekern import convert
from sparsekern.snapshot import Snapshot, undisturbed

PACKAGE = str(Path(sk.__file__).parent)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x):
        return self.relu(self.b(self.relu(self.norm(self.a(x)))) + x)


def net(mode):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), Block(8)]
    model = prepared(nn.Sequential(*layers, nn.Dropout(), nn.Flatten(), nn.Linear(128, 10)), 0.5)
    return model.train(mode == "training")


def state(model):
    """Everything one can see of a model, and the random numbers."""
    seen = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        tables = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
        ids = [[(key, id(v)) for key, v in module.__dict__[table].items()] for table in tables]
        values = [b.tolist() for b in module.buffers(recurse=False)]
        flags = [(p.requires_grad, p.grad) for p in module.parameters(recurse=False)]
        patched = [key for key in ("forward", convert.REPORT) if key in module.__dict__]
        seen.append((name, id(module), module.training, ids, values, flags, patched))
    return seen


class Interruption:
    """Raises KeyboardInterrupt at the n-th line that runs in the package; counts them without."""

    def __init__(self, at=None):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def convert_under(trace, model, x, mode):
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        sk.convert_to_sparse(model, x, mode=mode, cache=False, budget_s=1e-9)
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_at_any_line(monkeypatch, mode):
    forced(monkeypatch)
    monkeypatch.setattr("sparsekern.measure.timer.MIN_SAMPLE_S", 0)
    x = torch.randn(3, 3, 10, 10)
    count = Interruption()
    convert_under(count, net(mode), x, mode)
    model = net(mode)
    before = state(model)
    rng = random.Random(0)
    for line in sorted(rng.sample(range(100, count.lines - 200), 12)):
        with pytest.raises(KeyboardInterrupt):
            convert_under(Interruption(line), model, x, mode)
        assert state(model) == before, line
    convert_under(None, model, x, mode)
    assert sk.report(model).n_sparse == 4


def test_statistics_come_back_when_a_run_in_training_mode_is_interrupted(monkeypatch):
    class Interrupted(nn.Module):
        calls = 0

        def forward(self, x):
            Interrupted.calls += 1
            if Interrupted.calls > 1:
                raise KeyboardInterrupt
            return x

    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), Interrupted(), nn.ReLU())
    model[0].weight.data *= torch.rand(64, 64) > 0.9
    x = torch.randn(8, 64)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        sk.convert_to_sparse(model, x, mode="training", cache=False)
    assert state(model) == before


def test_a_second_interrupt_while_the_model_is_put_back(monkeypatch):
    forced(monkeypatch, model=lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    restore, tries = Snapshot.restore, []

    def impatient(self):
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(Snapshot, "restore", impatient)
    model, x = net("training"), torch.randn(3, 3, 10, 10)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        sk.convert_to_sparse(model, x, mode="training", cache=False)
    assert state(model) == before and len(tries) == 2


def test_statistics_made_under_inference_mode_come_back():
    with torch.inference_mode():
        norm = nn.BatchNorm1d(4)
    before = norm.running_mean.clone()
    with undisturbed(norm), torch.inference_mode():
        norm(torch.randn(8, 4))
    assert torch.equal(norm.running_mean, before)
