"""Conversion folds normalisations and fuses activations: exactly, and only where that is safe."""

import copy
import io
import pickle

import pytest
import torch
from fuse_common import ConvNet, forced, fused, prepared
from torch import nn

import sparsekern as sk
from sparsekern import norm
from sparsekern.fuse import FusedActivation, kind_of_activation


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    forced(monkeypatch)


def chain(*activations):
    """Linear layers, each followed by one of the activations."""
    layers = [m for a in activations for m in (nn.Linear(16, 16), a)]
    return prepared(nn.Sequential(*layers, nn.Linear(16, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_and_reported(dtype):
    model, x = prepared(ConvNet(), dtype=dtype), torch.randn(2, 3, 9, 9, dtype=dtype)
    statistics = model.na
    report = fused(model, x)
    assert report.folded == ["na", "nb", "nf"] and report.fused == ["relu"]
    assert report.fusion_error < (1e-5 if dtype == torch.float32 else 1e-14)
    assert [row.activation for row in report.layers] == ["relu", "none", "none"]
    assert isinstance(model.na, nn.Identity) and isinstance(model.relu, nn.Identity)
    assert type(model.last) is nn.ReLU and not statistics.training
    text = str(report)
    assert "3 normalisations folded: na, nb, nf" in text and "csr + relu" in text
    assert "1 activations fused: relu" in text and "outputs of the whole model within" in text


def test_off_and_training_mode_leave_modules_alone(monkeypatch):
    monkeypatch.setattr(norm, "_gain", lambda *_: 0.5)  # what gains is in test_train_fused.py
    x = torch.randn(2, 3, 9, 9)
    for options, train in (({"fuse": False}, False), ({"mode": "training"}, False), ({}, True)):
        model = prepared(ConvNet()).train(train)
        before = [m for m in model.modules() if not isinstance(m, (nn.Conv2d, nn.Linear))]
        report = sk.report(sk.convert_to_sparse(model, x, **options))
        assert report.n_sparse == 3 and not report.folded and not report.fused
        assert set(before) <= set(model.modules())
        assert (
            any("nothing folded or fused: the model is in tr" in n for n in report.notes) == train
        )
    model = prepared(ConvNet())
    model.nb.train()
    report = sk.report(sk.convert_to_sparse(model, x))
    assert not report.folded and "'nb' is in training mode" in report.notes[0]


def test_without_example_inputs_nothing_is_folded():
    model = prepared(ConvNet())
    assert not sk.report(sk.convert_to_sparse(model)).folded
    assert type(model.na) is nn.BatchNorm2d


ACCEPTED = {
    "relu": (nn.ReLU(), "relu"),
    "inplace": (nn.ReLU(inplace=True), "relu"),
    "threshold": (nn.Threshold(0, 0), "relu"),
    "relu6": (nn.ReLU6(), "relu6"),
    "hardtanh": (nn.Hardtanh(0.0, 6.0), "relu6"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu_tanh": (nn.GELU("tanh"), "gelu_tanh"),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations(name, dtype):
    activation, kind = ACCEPTED[name]
    model = chain(copy.deepcopy(activation)).to(dtype)
    assert fused(model, torch.randn(5, 16, dtype=dtype)).layers[0].activation == kind
    assert isinstance(model[1], FusedActivation) and type(activation).__name__ in repr(model[1])


def test_activations_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    kinds = {
        "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu",
        "gelu_10": None, "quick_gelu": None, "silu": None, "relu2": None, "relu6": "relu6",
    }  # fmt: skip
    for name, kind in kinds.items():
        assert kind_of_activation(activations.ACT2FN[name], torch.float32) == kind, name
    # Its constant has ten digits: equal in float32, not in float64.
    assert kind_of_activation(activations.ACT2FN["gelu_fast"], torch.float64) is None
    assert kind_of_activation(activations.ACT2FN["gelu_new"], torch.bfloat16) == "gelu_tanh"


class Odd(nn.Module):
    def forward(self, x):
        raise TypeError("expected two arguments")


@pytest.mark.parametrize(
    "module",
    [nn.LeakyReLU(), nn.Hardtanh(0, 5.9), nn.Hardtanh(0, 1e6), nn.Tanh(), nn.Softmax(-1),
     nn.Dropout(), nn.Flatten(), nn.GLU(), nn.RReLU(), Odd()],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_other_modules_are_no_fused_activation(module):
    assert kind_of_activation(module.eval(), torch.float32) is None


class Two(nn.Module):
    """Two layers; `run` says how they are used."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.act, self.other = nn.ReLU(), nn.GELU()
        self.run, self.kept, self.hidden = run, [], [self.act, self.a]

    def forward(self, x):
        return self.run(self, x)


def keep(m, x):
    y = m.a(x)
    m.kept[:] = [y.view(-1)]
    return m.act(y)


def two_kinds(m, x):
    return m.act(m.a(x)) + m.other(m.a(x))


REFUSED = {
    "read before": lambda m, x: (lambda y: y.sum() + m.act(y))(m.a(x)),
    "read after": lambda m, x: (lambda y: m.act(y) + y)(m.a(x)),
    "read by numpy": lambda m, x: (lambda y: m.act(y) + float(y.numpy()[0, 0]))(m.a(x)),
    "property that is a view": lambda m, x: (lambda y: m.act(y) + y.T.sum())(m.a(x)),
    "returned": lambda m, x: (lambda y: (m.act(y), y))(m.a(x)),
    "kept": keep,
    "functional": lambda m, x: torch.relu(m.a(x)),
    "of a sum": lambda m, x: m.act(m.a(x) + x),
    "of a sum too": lambda m, x: m.act(m.act(m.a(x)) + x),
    "of a view": lambda m, x: m.act(m.a(x).view(-1)),
    "of the input": lambda m, x: m.a(m.act(x)),
    "two kinds": two_kinds,
    "half of the calls": lambda m, x: m.act(m.a(x)) + m.a(x),
    "keyword": lambda m, x: m.act(input=m.a(x)),
    "activation in a list": lambda m, x: m.hidden[0](m.a(x)),
    "layer in a list": lambda m, x: m.act(m.hidden[1](x)),
    "in place between": lambda m, x: m.act(m.a(x).mul_(2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model, x = prepared(Two(REFUSED[name])), torch.randn(5, 16)
    report = fused(model, x)
    assert not report.fused and type(model.act) is nn.ReLU and type(model.other) is nn.GELU
    assert all(row.activation == "none" for row in report.layers)


@pytest.mark.parametrize("where", ["act", "a"])
def test_hooks_and_patched_forwards_are_kept(where):
    seen = []
    model, x = prepared(Two(lambda m, x: m.act(m.a(x)))), torch.randn(5, 16)
    getattr(model, where).register_forward_hook(lambda *a: seen.append(1))
    assert not fused(model, x).fused and seen
    model = prepared(Two(lambda m, x: m.act(m.a(x))))
    module = getattr(model, where)
    module.forward = lambda x, forward=module.forward: forward(x) + 1
    assert not fused(model, x).fused


SAFE = {
    "shared by two layers": (lambda m, x: m.act(m.b(m.act(m.a(x)))), ["act"]),
    "read after in place": (lambda m, x: (lambda y: m.act(y) + y)(m.a(x)), ["act"]),
    "shape asked for": (lambda m, x: (lambda y: m.act(y) * y.shape[0] * y.dim())(m.a(x)), ["act"]),
    "layer called twice": (lambda m, x: m.act(m.a(m.act(m.a(x)))), ["act"]),
    "two kinds": (lambda m, x: m.act(m.a(x)) + m.other(m.b(x)), ["act", "other"]),
}


@pytest.mark.parametrize("name", SAFE)
def test_safe(name):
    run, names = SAFE[name]
    model, x = prepared(Two(run)), torch.randn(5, 16)
    model.act.inplace = name == "read after in place"
    assert fused(model, x).fused == names


def test_one_module_in_several_places():
    """Places are told apart: where it follows a sum it stays, elsewhere it goes."""

    class Block(nn.Module):
        def __init__(self, act, residual):
            super().__init__()
            self.fc, self.act, self.residual = nn.Linear(16, 16), act, residual

        def forward(self, x):
            return self.act(self.fc(x) + x if self.residual else self.fc(x))

    act = nn.ReLU()
    model = prepared(nn.Sequential(Block(act, False), Block(act, True), Block(act, False)))
    assert fused(model, torch.randn(5, 16)).fused == ["0.act", "2.act"]
    assert model[1].act is act
    sk.to_dense(model)
    assert model[0].act is model[1].act is model[2].act is act


def test_an_activation_that_also_serves_a_dense_layer_stays(monkeypatch):
    model = prepared(Two(lambda m, x: m.act(m.b(m.act(m.a(x))))))
    forced(monkeypatch, sparse=lambda layer: layer is model.a)
    report = fused(model, torch.randn(5, 16))
    assert report.n_sparse == 1 and not report.fused and model.a.activation == "none"


def test_to_dense_brings_activations_back():
    model, x = chain(nn.ReLU(), nn.GELU("tanh")), torch.randn(5, 16)
    before, activations = copy.deepcopy(model), [model[1], model[3]]
    fused(model, x)
    for dense in (sk.to_dense(copy.deepcopy(model)), sk.to_dense(model)):
        assert [type(m) for m in dense] == [type(m) for m in before]
        for name, tensor in before.state_dict().items():
            assert torch.equal(dense.state_dict()[name], tensor), name
    assert [model[1], model[3]] == activations


def test_to_dense_of_a_part_keeps_the_activation():
    model, x = chain(nn.ReLU()), torch.randn(5, 16)
    fused(model, x)
    want = model[0](x)
    part = sk.to_dense(nn.Sequential(model[0]))
    assert [type(m) for m in part[0]] == [nn.Linear, nn.ReLU]
    torch.testing.assert_close(part(x), want)
    model[0] = nn.Linear(16, 16)  # the layer that computed it is gone
    sk.to_dense(model)
    assert isinstance(model[1], FusedActivation)


def test_to_dense_keeps_normalisations_folded():
    model, x = prepared(ConvNet(), dtype=torch.float64), torch.randn(2, 3, 9, 9).double()
    folded = copy.deepcopy(model)
    sk.fold_batchnorm(folded, x)
    fused(model, x)
    sk.to_dense(model)
    assert type(model.a) is nn.Conv2d and type(model.relu) is nn.ReLU
    assert type(model.na) is type(folded.na)
    for name, tensor in folded.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_goes_back_whole(monkeypatch):
    forced(monkeypatch, whole=0.9)
    model, x = prepared(ConvNet()), torch.randn(2, 3, 9, 9)
    modules, parameters = list(model.modules()), list(model.parameters())
    report = sk.report(sk.convert_to_sparse(model, x))
    assert report.reverted and not report.folded and not report.fused
    assert "not faster than dense with its normalisations folded" in report.notes[0]
    assert list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    forced(monkeypatch, sparse=lambda layer: False)  # no layer wins
    sk.convert_to_sparse(model, x, cache=False)
    assert list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_real_timing_of_three_sides(monkeypatch):
    from sparsekern import candidate, convert

    times = []
    monkeypatch.setattr(
        convert, "time_model", lambda *a: times.append(candidate.time_model(*a)) or (2.0, 1.0, 2.0)
    )
    model, x = prepared(ConvNet()), torch.randn(2, 3, 9, 9)
    report = fused(model, x, budget_s=0.01)
    dense, sparse, gain = times[0]
    assert min(dense, sparse, gain, report.model_folded_ms) > 0
    assert "ms dense and folded" in report.summary()


def test_interrupted(monkeypatch):
    from sparsekern import convert

    def interrupted(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "time_model", interrupted)
    model = prepared(ConvNet())
    modules = list(model.modules())
    with pytest.raises(KeyboardInterrupt):
        sk.convert_to_sparse(model, torch.randn(2, 3, 9, 9))
    assert list(model.modules()) == modules


MISREAD = {
    "asks for the module": (lambda m, x: m.b(m.act(m.a(x))) + isinstance(m.act, nn.ReLU),
                            "outputs differ by"),
    "needs the module": (lambda m, x: m.b(m.act(m.a(x))) * (1 + m.act.inplace), "inplace"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISREAD)
def test_what_a_run_cannot_show_is_noticed(name):
    """The whole model is compared; it is then converted without folding and fusing."""
    run, message = MISREAD[name]
    model, x = prepared(Two(run)), torch.randn(5, 16)
    report = fused(model, x)
    assert report.n_sparse == 2 and not report.fused
    assert type(model.act) is nn.ReLU and model.a.activation == "none"
    (note,) = report.notes
    assert note.startswith("nothing folded or fused: ") and message in note


def test_a_run_that_fails_while_it_is_watched():
    def watched(m, x):
        if torch.overrides._get_current_function_mode_stack():
            raise RuntimeError("no modes, please")
        return m.b(m.act(m.a(x)))

    report = fused(prepared(Two(watched)), torch.randn(5, 16))
    assert report.n_sparse == 2 and not report.fused
    (note,) = report.notes
    assert "nothing folded or fused: a run could not be watched" in note and "no modes" in note


def test_copies_and_pickles():
    model, x = chain(nn.ReLU()), torch.randn(5, 16)
    fused(model, x)
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want)
        assert other[1].fused[1][0] is other[0] is not model[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), want)
