"""fold_batchnorm: exact, and only where nothing else reads the layer's output."""

import copy

import pytest
import torch
from fuse_common import forced, fused, prepared
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekern as sk


def settled(model):
    """Running statistics and affine parameters that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, bias=False)
        self.na = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.nb = nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 8, 1)
        self.nc = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.nt = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.nf = nn.BatchNorm1d(5)

    def forward(self, x):
        x = torch.relu_(self.na(self.a(x)))
        y = self.b(x)
        x = self.nb(y) + y  # the output of b is read twice
        seen = self.c(x)
        x = self.nc(seen)
        x = self.nt(self.twice(self.twice(x)))
        return self.nf(self.fc(x.mean((2, 3)))), seen  # and the output of c is returned


def test_folds_exactly_what_is_safe():
    model, x = settled(Net()), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        model.a.weight[:, 1] = 0
    want = [y.detach() for y in model(x)]
    assert sk.fold_batchnorm(model, x) == ["na", "nf"]
    assert isinstance(model.na, nn.Identity) and isinstance(model.nb, nn.BatchNorm2d)
    assert bool((model.a.weight[:, 1] == 0).all())
    for got, exact in zip(model(x), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert not model.a._forward_hooks


def test_resnet_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=4
    )
    model = settled(transformers.ResNetForImageClassification(config))
    x = torch.randn(1, 3, 32, 32)
    want = model(x).logits.detach()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert len(sk.fold_batchnorm(model, {"pixel_values": x})) == norms
    torch.testing.assert_close(model(x).logits, want, rtol=1e-3, atol=1e-4)


def test_training_mode_is_refused():
    x = torch.randn(2, 3, 9, 9)
    with pytest.raises(ValueError, match="fold_batchnorm: expected a model in eval mode, got one"):
        sk.fold_batchnorm(Net().train(), x)
    model = settled(Net())
    model.nb.train()
    with pytest.raises(ValueError, match="expected a model in eval mode, got 'nb' in training"):
        sk.fold_batchnorm(model, x)


def test_float64_is_exact():
    model = settled(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8))).double()
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    want = model(x)
    assert sk.fold_batchnorm(model, x) == ["1"]
    torch.testing.assert_close(model(x), want, rtol=1e-13, atol=1e-13)


def test_without_affine_parameters_and_frozen():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)).eval()
    model[1].running_var.uniform_(0.5, 2)
    model[0].requires_grad_(False)
    x = torch.randn(2, 3, 9, 9)
    want = model(x)
    assert sk.fold_batchnorm(model, x) == ["1"]
    torch.testing.assert_close(model(x), want)
    assert not model[0].weight.requires_grad and not model[0].bias.requires_grad


class Pair(nn.Module):
    """A linear layer and a normalisation; `run` says how they are used."""

    def __init__(self, run):
        super().__init__()
        self.fc, self.norm, self.other = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.drop, self.run, self.kept, self.hidden = nn.Dropout(), run, [], [self.fc, self.norm]

    def forward(self, x):
        return self.run(self, x)


def keep(m, x):
    y = m.fc(x)
    m.kept[:] = [y[:1]]
    return m.norm(y)


REFUSED = {
    "read twice": lambda m, x: (lambda y: m.norm(y) + y)(m.fc(x)),
    "property that is a view": lambda m, x: (lambda y: m.norm(y) + y.mT.sum())(m.fc(x)),
    "data": lambda m, x: (lambda y, d: m.norm(y) + d)(*(lambda y: (y, y.data))(m.fc(x))),
    "tolist": lambda m, x: (lambda y: m.norm(y) + y.tolist()[0][0])(m.fc(x)),
    "returned in a dict": lambda m, x: (lambda y: {"y": y, "n": m.norm(y)})(m.fc(x)),
    "kept": keep,
    "changed in place": lambda m, x: m.norm(m.fc(x).mul_(2)),
    "another module between": lambda m, x: m.norm(m.drop(m.fc(x))),
    "layer called twice": lambda m, x: m.norm(m.fc(m.fc(x))),
    "norm called twice": lambda m, x: m.norm(m.fc(m.norm(x))),
    "weight read elsewhere": lambda m, x: m.norm(m.fc(x)) @ m.fc.weight,
    "layer in a list": lambda m, x: m.norm(m.hidden[0](x)),
    "norm in a list": lambda m, x: m.hidden[1](m.fc(x)),
    "three dimensions": lambda m, x: m.norm(m.fc(x.expand(4, 6, 6))),
}


def unchanged(model, x):
    before = copy.deepcopy(model.state_dict())
    assert sk.fold_batchnorm(model, x) == []
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    unchanged(settled(Pair(REFUSED[name])), torch.randn(6, 6))


def tied(m):
    m.other.weight = m.fc.weight


CHANGES = {
    "hook on the layer": lambda m: m.fc.register_forward_hook(lambda *a: None),
    "hook on the norm": lambda m: m.norm.register_forward_pre_hook(lambda *a: None),
    "gradient hook": lambda m: m.norm.register_full_backward_hook(lambda *a: None),
    "patched forward": lambda m: setattr(m.norm, "forward", lambda y: y + 1),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.fc),
    "pruned by torch": lambda m: torch_prune.l1_unstructured(m.fc, "weight", 0.5),
    "tied weight": tied,
    "batch statistics": lambda m: setattr(m, "norm", nn.BatchNorm1d(6, track_running_stats=False)),
    "statistics without values": lambda m: m.norm.running_var.fill_(float("inf")).neg_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_modules_that_cannot_be_folded(name):
    model = settled(Pair(lambda m, x: m.norm(m.fc(x))))
    CHANGES[name](model)
    unchanged(model.eval(), torch.randn(6, 6))


def test_a_run_that_fails_leaves_the_model_as_it_was():
    model = settled(Net())
    modules, hooks = list(model.modules()), [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError):
        sk.fold_batchnorm(model, torch.randn(2, 5, 9, 9))
    assert list(model.modules()) == modules
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_weights_in_one_storage():
    """As a file leaves them; reading one is not reading the others."""
    model, x = settled(Net()), torch.randn(2, 3, 9, 9)
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view(p.shape)
    want = [y.detach() for y in model(x)]
    assert sk.fold_batchnorm(model, x) == ["na", "nf"]
    torch.testing.assert_close(model(x)[0], want[0], rtol=1e-4, atol=1e-5)


def test_part_of_a_weight_read_elsewhere():
    unchanged(settled(Pair(lambda m, x: m.norm(m.fc(x)) + m.fc.weight[3])), torch.randn(6, 6))


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a normalisation with an activation inside."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        options = self.running_mean, self.running_var, self.weight, self.bias, self.training
        x = nn.functional.batch_norm(x, *options, self.momentum, self.eps)
        return self.act(self.drop(x))


class Odd(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.BatchNorm2d):
    """Another name, nothing else."""


def with_norm(norm):
    return prepared(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.Conv2d(8, 4, 1)), 0.5)


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.Identity(), nn.GELU()])
def test_a_normalisation_with_an_activation_inside_folds(act):
    model, x = with_norm(NormAct(8, act)), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        want = model(x)
        assert sk.fold_batchnorm(model, x) == ["1"]
        torch.testing.assert_close(model(x), want)
    assert model[1].act is act and not list(model[1].parameters())


def test_its_activation_is_fused_and_comes_back(monkeypatch, tmp_path):
    forced(monkeypatch)
    model, x = with_norm(NormAct(8, nn.ReLU())), torch.randn(2, 3, 9, 9)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        want = model(x)
        report = fused(model, x)
        assert report.folded == ["1"] and report.fused == ["1.act"]
        assert model[0].activation == "relu"
        sk.save(model, tmp_path / "model.safetensors")
        sk.load(fresh, tmp_path / "model.safetensors")
        torch.testing.assert_close(fresh(x), want)
        sk.to_dense(model)
        torch.testing.assert_close(model(x), want)
    assert type(model[1].act) is nn.ReLU


def test_a_class_that_only_has_another_name_folds():
    model, x = with_norm(Renamed(8)), torch.randn(2, 3, 9, 9)
    assert sk.fold_batchnorm(model, x) == ["1"] and isinstance(model[1], nn.Identity)


def test_a_normalisation_that_computes_something_else_is_named(monkeypatch):
    forced(monkeypatch)
    model, x = with_norm(Odd(8)), torch.randn(2, 3, 9, 9)
    report = fused(model, x)
    assert report.folded == [] and isinstance(model[1], Odd)
    assert report.notes == ["not folded, as they compute more than a normalisation: 1"]
