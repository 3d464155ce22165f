"""What a conversion for training fuses: ReLU and max pools, with nothing lost on the way."""

import copy

import pytest
import torch
from fuse_common import forced
from torch import nn

import sparsekern as sk
from sparsekern import norm, pool
from sparsekern.ops._library import activation_backward


def network(activation=None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        activation or nn.ReLU(),
        nn.Dropout(0.5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 4),
    )
    sk.prune(model, sparsity=0.8, scope="uniform")
    return model.train()


@pytest.fixture
def x():
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def convert(monkeypatch, model, x, norm_gain=0.5, **options):
    forced(monkeypatch)
    monkeypatch.setattr(pool, "_gain", lambda *_: 2.0)
    monkeypatch.setattr(norm, "_gain", lambda *_: norm_gain)
    return sk.convert_to_sparse(model, x, mode="training", cache=False, **options)


def gradients(model, x, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("norm_gain", [0.5, 2.0])
def test_same_loss_and_gradients(monkeypatch, x, norm_gain):
    dense = network()
    sparse = convert(monkeypatch, copy.deepcopy(dense), x, norm_gain)
    done = sk.report(sparse)
    assert done.folded == [] and done.pools == ["6"]
    if norm_gain > 1:
        assert sorted(done.fused) == ["2", "4"] and done.norms == ["1"]
        assert "1 normalisations by our op: 1" in str(done)
    else:
        assert done.fused == ["4"] and done.norms == []
    want, wanted = gradients(dense, x)
    got, found = gradients(sparse, x)
    torch.testing.assert_close(got, want)
    for name, grad in found.items():
        if name.endswith("weight.values"):
            layer = sparse.get_submodule(name.removesuffix(".weight.values"))
            full = wanted[name.removesuffix(".values")]
            torch.testing.assert_close(grad, layer.weight.gather(full))
        else:
            torch.testing.assert_close(grad, wanted[name])
    for name, buffer in dense.named_buffers():  # running statistics
        torch.testing.assert_close(sparse.get_buffer(name), buffer)


def test_batch_statistics_mode_and_random_numbers_come_back(monkeypatch, x):
    model = network()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    sparse = convert(monkeypatch, model, x, 2.0)
    assert torch.equal(torch.rand(3), want)
    assert all(module.training for module in sparse.modules())
    for name, buffer in before.items():
        assert torch.equal(sparse.get_buffer(name), buffer)


def test_gelu_is_not_fused_for_training(monkeypatch, x):
    sparse = convert(monkeypatch, network(nn.GELU()), x)
    assert sk.report(sparse).fused == []
    assert isinstance(sparse[4], nn.GELU)


def test_fuse_false_leaves_the_modules(monkeypatch, x):
    sparse = convert(monkeypatch, network(), x, fuse=False)
    assert sk.report(sparse).fused == [] and isinstance(sparse[4], nn.ReLU)


@pytest.mark.parametrize("norm_gain", [0.5, 2.0])
def test_there_and_back_keeps_weights_and_modules(monkeypatch, x, norm_gain):
    dense = network()
    sparse = convert(monkeypatch, copy.deepcopy(dense), x, norm_gain)
    back = sk.to_dense(sparse)
    assert [type(m) for m in back] == [type(m) for m in dense]
    for name, value in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def test_a_trained_normalisation_comes_back_as_it_is(monkeypatch, x):
    model = network()
    first = model[1]
    sparse = convert(monkeypatch, model, x, 2.0)
    assert isinstance(sparse[1], norm.ContiguousBatchNorm2d) and isinstance(sparse[2], nn.Identity)
    sparse = copy.deepcopy(sparse.double())  # has put other buffers in the place of those shared
    sparse(x.double())
    trained = {n: v.clone() for n, v in sparse[1].state_dict().items()}
    sparse.eval()
    want = sparse(x.double())
    back = sk.to_dense(sparse)
    assert type(back[1]) is nn.BatchNorm2d and type(back[2]) is nn.ReLU and back[1] is not first
    for name, value in trained.items():
        assert torch.equal(back[1].state_dict()[name], value)
    torch.testing.assert_close(back(x.double()), want)


def test_a_normalisation_whose_relu_cannot_come_back_brings_one(monkeypatch, x):
    sparse = convert(monkeypatch, network(), x, 2.0)
    sparse.eval()
    want = sparse(x)
    sparse[2] = nn.Identity()  # what told which module was there is gone
    back = sk.to_dense(sparse)
    assert [type(m) for m in back[1]] == [nn.BatchNorm2d, nn.ReLU]
    torch.testing.assert_close(back(x), want)


def test_normalisations_in_channels_last_stay(monkeypatch, x):
    sparse = convert(monkeypatch, network(), x.contiguous(memory_format=torch.channels_last), 2.0)
    assert type(sparse[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_gradient_of_an_activation_against_autograd(name):
    x = torch.linspace(-9, 9, 37, dtype=torch.float64, requires_grad=True)  # holds -6, 0 and 6
    y = getattr(torch.nn.functional, name)(x)
    grad = torch.linspace(1, 2, 37, dtype=torch.float64)
    want = torch.autograd.grad(y, x, grad)[0]
    assert torch.equal(activation_backward(grad, name, y.detach(), None), want)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 1, "padding": 1, "dilation": 2}, {"ceil_mode": True}]
)
def test_gradient_of_a_pool_by_way_of_channels_last(options):
    plain = nn.MaxPool2d(3, **options)
    twin = nn.MaxPool2d(3, **options)
    twin.__class__ = pool.ChannelsLastMaxPool2d
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64).requires_grad_()
    grad = torch.randn_like(plain(x))
    want = torch.autograd.grad(plain(x), x, grad)[0]
    assert torch.equal(torch.autograd.grad(twin(x), x, grad)[0], want)
    assert twin(x).is_contiguous() and torch.equal(twin(x), plain(x))
    assert torch.autograd.gradgradcheck(twin, x)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x, grad)[0], want)
