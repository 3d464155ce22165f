"""fold_batchnorm: exact, and only where nothing else reads the layer's output."""

import pytest
import torch
from torch import nn

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
    with pytest.raises(ValueError, match="fold_batchnorm: expected a model in eval mode, got"):
        sk.fold_batchnorm(Net().train(), torch.randn(2, 3, 9, 9))
