"""The choice counts in every way a model is called, and the report prints what decided."""

import copy

import pytest
import torch
from convert_common import forced, sparsified, wide
from torch import nn

import sparsekern as sk
from sparsekern import candidate, choose, convert, pool, tune
from sparsekern.conversion import gain_text
from sparsekern.measure.timer import Timing
from sparsekern.tune import WAYS


def timed(monkeypatch, layers, model=None):
    """Times by the way: (dense, sparse) of layers, (dense, sparse, gain) of the model."""
    asked = []

    def time_layer(dense, sparse, spec, way, *rest):
        asked.append(way)
        return layers[way]

    def time_model(model_, converted, taken, inputs, way, *rest):
        asked.append(f"model {way}")
        return model[way]

    monkeypatch.setattr(choose, "time_layer", time_layer)
    if model:
        monkeypatch.setattr(convert, "time_model", time_model)
    else:
        monkeypatch.setattr(convert, "time_model", lambda *a: (2.0, 1.0, 2.0))
    return asked


def one_layer():
    return sparsified(nn.Sequential(nn.Linear(64, 64))), torch.randn(2, 64)


def test_a_layer_that_loses_with_gradients_stays_dense(monkeypatch):
    times = {"inference_mode": (0.02, 0.01), "no_grad": (0.02, 0.011), "gradients": (0.02, 0.03)}
    asked = timed(monkeypatch, times)
    model, x = one_layer()
    (row,) = sk.report(sk.convert_to_sparse(model, x, cache=False)).layers
    assert asked == list(WAYS)
    assert row.format == "dense" and row.way == "gradients"
    assert (row.dense_ms, row.sparse_ms) == (0.02, 0.03)
    assert row.reason == "not faster: 0.66x with gradients on"


def test_the_way_with_the_least_gain_is_reported(monkeypatch):
    times = {"inference_mode": (0.03, 0.01), "no_grad": (0.03, 0.015), "gradients": (0.03, 0.012)}
    timed(monkeypatch, times)
    model, x = one_layer()
    report = sk.report(sk.convert_to_sparse(model, x, cache=False))
    (row,) = report.layers
    assert row.format == "csr" and row.way == "no_grad"
    assert row.reason == "faster: 2.00x under no_grad" and "2.00x" in str(report)


@pytest.mark.parametrize("times", [(10.0, 5.0), (0.01, 0.02)])
def test_what_is_clear_is_timed_in_one_way_only(monkeypatch, times):
    """Large layers win by more than the host takes; what loses in one way has lost."""
    asked = timed(monkeypatch, {"inference_mode": times})
    model, x = one_layer()
    sk.convert_to_sparse(model, x, cache=False)
    assert asked == ["inference_mode"]


def test_when_another_way_could_turn_the_choice():
    assert tune.is_close(0.10, 0.05, 1.05, 1)  # the host
    assert tune.is_close(1.3, 1.0, 1.05, 1)  # what is kept for gradients
    assert not tune.is_close(100.0, 90.0, 1.05, 1)  # neither of them is so long
    assert tune.is_close(100.0, 90.0, 1.05, 10)
    assert not tune.is_close(1.0, 1.0, 1.05, 1)  # lost


def test_without_parameters_that_need_gradients_there_are_two_ways(monkeypatch):
    times = dict.fromkeys(WAYS, (0.02, 0.01))
    asked = timed(monkeypatch, times)
    model, x = one_layer()
    sk.convert_to_sparse(model.requires_grad_(False), x, cache=False)
    assert asked == ["inference_mode", "no_grad"]


def test_training_is_timed_as_training(monkeypatch):
    asked = timed(monkeypatch, {"training": (0.02, 0.01)})
    model, x = one_layer()
    (row,) = sk.report(sk.convert_to_sparse(model, x, mode="training", cache=False)).layers
    assert asked == ["training"] and row.way == "training" and row.reason == "faster: 2.00x"


def test_a_model_that_loses_in_one_way_goes_back(monkeypatch):
    layers = dict.fromkeys(WAYS, (0.02, 0.018))
    model_times = {
        "inference_mode": (0.02, 0.017, 1.17),
        "no_grad": (0.02, 0.0195, 1.03),
        "gradients": (0.024, 0.026, 0.93),
    }
    asked = timed(monkeypatch, layers, model_times)
    model, x = one_layer()
    before = model[0]
    report = sk.report(sk.convert_to_sparse(model, x, cache=False))
    assert model[0] is before and report.reverted
    assert asked[3:] == [f"model {way}" for way in WAYS]
    assert (report.model_dense_ms, report.model_sparse_ms) == (0.024, 0.026)
    assert report.model_gain == 0.93 and report.model_way == "gradients"
    assert report.model_gains == {"inference_mode": 1.17, "no_grad": 1.03, "gradients": 0.93}
    assert report.notes == ["reverted: the whole model was not faster: 0.93x with gradients on"]
    assert "0.02 ms dense, 0.03 ms sparse (0.93x with gradients on)" in report.summary()


@pytest.mark.parametrize(("gain", "sparse"), [(1.03, 1), (1.01, 0)])
def test_the_whole_model_has_to_win_clearly(monkeypatch, gain, sparse):
    """So that the noise of a clock does not make a model slower."""
    timed(monkeypatch, {"inference_mode": (9.0, 5.0)}, {"inference_mode": (9.0, 9.0 / gain, gain)})
    monkeypatch.setattr(convert, "ways_of", lambda *a: ("inference_mode",))
    model, x = one_layer()
    assert sk.report(sk.convert_to_sparse(model, x, cache=False)).n_sparse == sparse


def test_once_more_with_the_layers_that_win_clearly(monkeypatch):
    def time_layer(dense, *rest):
        layer = dense[0] if isinstance(dense, nn.Sequential) else dense
        return (9.0, 3.0) if layer.in_features == 512 else (9.0, 8.0)

    monkeypatch.setattr(convert, "ways_of", lambda *a: ("inference_mode",))
    gains = iter([0.97, 1.4])
    tries = []

    def time_model(model, converted, taken, *rest):
        tries.append(len(taken))
        gain = next(gains)
        return gain * 10, 10.0, gain

    monkeypatch.setattr(choose, "time_layer", time_layer)
    monkeypatch.setattr(convert, "time_model", time_model)
    model, x = wide(), torch.randn(4, 512)
    want = model(x)
    report = sk.report(sk.convert_to_sparse(model, x, cache=False))
    assert tries == [2, 1] and not report.reverted
    assert [row.format for row in report.layers] == ["csr", "dense"]
    left_out = "left out: the whole model was not faster: 0.97x under inference_mode"
    assert left_out in report.layers[1].reason
    assert report.model_gain == 1.4 and "1 surest" in report.notes[0]
    assert model[0].activation == "relu" and report.fused == ["1"]
    torch.testing.assert_close(model(x), want)


def test_layers_that_others_read_are_left_out_when_the_model_does_not_run(monkeypatch):
    forced(monkeypatch, model=convert.time_model)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.plain = nn.Linear(512, 512), nn.Linear(512, 512)

        def forward(self, x):
            return self.plain(self.read(x) @ self.read.weight)

    model, x = sparsified(Reads()), torch.randn(64, 512)
    want = model(x)
    with pytest.warns(UserWarning, match="the converted model does not run"):
        sk.convert_to_sparse(model, x, cache=False)
    assert type(model.read) is nn.Linear
    torch.testing.assert_close(model(x), want)


def test_a_model_without_gradients_is_not_timed_with_them(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("for inference only")
            return self.fc(x)

    asked = timed(
        monkeypatch, dict.fromkeys(WAYS, (0.02, 0.01)), dict.fromkeys(WAYS, (0.02, 0.01, 2.0))
    )
    model = sparsified(Net())
    report = sk.report(sk.convert_to_sparse(model, torch.randn(2, 64), cache=False))
    assert report.n_sparse == 1 and list(report.model_gains) == ["inference_mode", "no_grad"]
    assert "model gradients" not in asked


@pytest.mark.parametrize("way", [*WAYS, "training"])
def test_layers_are_called_in_the_way_they_are_timed_in(monkeypatch, way):
    seen = []

    class Layer(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append((torch.is_inference_mode_enabled(), y.requires_grad, x.requires_grad))
            return y

    spec = tune.InputSpec((2, 8), torch.float32)
    layers = Layer(8, 8), Layer(8, 8)
    with torch.inference_mode():  # whatever the mode of the caller
        dense_ms, sparse_ms = tune.time_layer(*layers, spec, way, 1e-3)
    recorded = way in ("gradients", "training")
    assert set(seen) == {(way == "inference_mode", recorded, recorded)}
    assert min(dense_ms, sparse_ms) > 0


def test_the_whole_model_is_called_in_each_way():
    modes = []

    class Net(nn.Sequential):
        def forward(self, x):
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return super().forward(x)

    model, x = Net(nn.Linear(4, 4)).eval(), torch.randn(1, 4)
    for way, want in zip(WAYS, [(True, False), (False, False), (False, True)], strict=True):
        modes.clear()
        times = candidate.time_model(model, model, [], x, way, 1e-3, convert.Folds())
        assert set(modes) == {want} and min(times) > 0


def test_a_pool_that_loses_with_gradients_stays(monkeypatch):
    def interleaved(calls, **_):
        lost = torch.is_grad_enabled()
        return [Timing.from_samples([t] * 3, 1) for t in ((1.0, 2.0) if lost else (3.0, 1.0))]

    monkeypatch.setattr(pool, "interleaved", interleaved)
    model, x = nn.Sequential(nn.MaxPool2d(2)), torch.randn(1, 4, 8, 8)
    specs = {id(model[0]): {tune.InputSpec.of(x): 1}}
    assert pool.faster_pools(model, specs, 0.01) == []


def test_a_gain_is_cut_and_not_rounded():
    """What did not reach 1.05 is not printed as 1.05."""
    assert gain_text(1.0499) == "1.04x" and gain_text(1.05) == "1.05x"
    assert gain_text(1.15) == "1.15x" and gain_text(2.0, "no_grad") == "2.00x under no_grad"


def test_real_times_in_three_ways_keep_the_outputs(one_thread):
    model = sparsified(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)), 0.9)
    x, before = torch.randn(16, 256), copy.deepcopy(model)
    sk.convert_to_sparse(model, x, cache=False, budget_s=0.02)
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)


def test_conversion_under_the_inference_mode_of_the_caller(monkeypatch):
    forced(monkeypatch)
    for mode in ("inference", "training"):
        model, x = wide(), torch.randn(4, 512)
        with torch.inference_mode():
            sk.convert_to_sparse(model, x, mode=mode, cache=False)
        model(x).sum().backward()
        assert model[0].weight.values.grad is not None


def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        model = sparsified(nn.Sequential(nn.Linear(64, 64)))
    assert candidate.ways_of(model, "inference", False) == ("inference_mode",)
    assert candidate.ways_of(nn.Linear(2, 2), "inference", True) == ("inference_mode",)
    x = torch.randn(2, 64)
    sk.convert_to_sparse(model, x, cache=False, budget_s=0.01)
