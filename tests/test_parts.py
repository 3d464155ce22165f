"""Batches of images in parts: when, what comes out, and the way back."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from fuse_common import forced, prepared
from torch import nn

import sparsekern as sk
from sparsekern import parts
from sparsekern.measure.timer import Timing
from sparsekern.parts import InParts, faster_in_parts


class Net(nn.Module):
    """Notes the size of each batch it sees."""

    def __init__(self):
        super().__init__()
        self.conv, self.sizes = nn.Conv2d(3, 5, 3), []

    def forward(self, x, scale=1):
        self.sizes.append(len(x))
        return self.conv(x).mean((2, 3)) * scale


@pytest.fixture
def clock(monkeypatch):
    """Times by the clock's order: parts of 1 take 5 ms, of 2 take 3, whole batches 4."""
    whole = []

    def interleaved(calls, **_):
        again = calls[0] in whole  # the best one, timed once more
        times = [4.0, 3.0] if again else [4.0, 5.0, 3.0, 6.0][: len(calls)]
        whole.append(calls[0])
        return [Timing.from_samples([t] * 3, 1) for t in times]

    monkeypatch.setattr(parts, "interleaved", interleaved)
    forced(monkeypatch)


@pytest.fixture
def converted(clock):
    torch.manual_seed(0)
    model, x = prepared(Net()), torch.randn(5, 3, 8, 8)
    want = model(x).detach()
    sk.convert_to_sparse(model, x, cache=False)
    model.sizes.clear()
    return model, x, want


def run(model, *args, **kwargs):
    model.sizes.clear()
    with torch.no_grad():
        return model(*args, **kwargs), list(model.sizes)


def test_the_fastest_size_is_taken_and_reported(converted):
    model, x, want = converted
    y, sizes = run(model, x)
    torch.testing.assert_close(y, want)
    assert sizes == [2, 2, 1]
    report = sk.report(model)
    assert report.part_images == 2 and report.part_gain == pytest.approx(4 / 3)
    assert "batches of images run in parts of 2: 1.33x faster than whole" in str(report)
    y, sizes = run(model, x=x)  # by keyword
    assert torch.equal(y, run(model, x)[0]) and sizes == [2, 2, 1]


def test_other_calls_run_whole(converted):
    model, x, want = converted
    assert run(model, x[:2])[1] == [2]
    assert run(model, x, 2)[1] == run(model, x, scale=2)[1] == [5]
    model.sizes.clear()
    torch.testing.assert_close(model(x).detach(), want)  # with gradients
    assert model.sizes == [5]
    model.train()
    assert run(model, x)[1] == [5]


def test_copies_pickles_compilation_and_the_way_back(converted):
    model, x, want = converted
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.model is other
        y, sizes = run(other, x)
        assert sizes == [2, 2, 1]
        torch.testing.assert_close(y, want)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want)
    sk.to_dense(model)
    assert "forward" not in model.__dict__ and run(model, x)[1] == [5]


@pytest.mark.parametrize("inputs", [torch.randn(1, 3, 8, 8), torch.randn(4, 3)])
def test_nothing_to_split(clock, inputs):
    model = nn.Flatten() if inputs.dim() == 2 else Net()
    assert faster_in_parts(model.eval(), inputs, 0.01) == (None, 1.0)


@pytest.mark.parametrize(
    "output",
    [
        lambda y: y.softmax(0),  # images that see each other
        lambda y: y.mean(),
        lambda y: (y, 3),
        lambda y: {"rows": y, "all": y.sum(0)},
        lambda y: "text",
    ],
)
def test_outputs_that_are_no_rows_of_images(clock, output):
    class Odd(Net):
        def forward(self, x):
            return output(super().forward(x))

    assert faster_in_parts(Odd().eval(), torch.randn(5, 3, 8, 8), 0.01)[0] is None


def test_outputs_in_several_tensors(clock):
    class Several(Net):
        def forward(self, x):
            y = super().forward(x)
            return OrderedDict(a=y, rest=(y + 1, None))

    model, x = Several().eval(), torch.randn(5, 3, 8, 8)
    way, _ = faster_in_parts(model, x, 0.01)
    assert isinstance(way, InParts) and way.size == 2
    with torch.no_grad():
        want, got = model(x), way(x)
    assert type(got) is OrderedDict and got["rest"][1] is None
    torch.testing.assert_close(got["a"], want["a"])
    torch.testing.assert_close(got["rest"][0], want["rest"][0])


def test_whole_batches_where_parts_are_not_faster(monkeypatch):
    times = [Timing.from_samples([t] * 3, 1) for t in (4.0, 5.0, 3.9, 6.0)]
    monkeypatch.setattr(parts, "interleaved", lambda calls, **_: times)
    assert faster_in_parts(Net().eval(), torch.randn(5, 3, 8, 8), 0.01)[0] is None
