"""Shared by the tests of folding and fusing."""

import torch
from torch import nn

import sparsekern as sk
from sparsekern import choose, convert


def prepared(model, sparsity=0.9, dtype=torch.float32):
    """Zeros in the weights, normalisations that matter, eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= torch.rand_like(p) > sparsity
    return model.to(dtype).eval()


class ConvNet(nn.Module):
    """Conv, norm and ReLU twice with a shared ReLU, a residual sum, and a head."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.last = nn.ReLU(inplace=True), nn.ReLU()
        self.fc, self.nf = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.relu(self.na(self.a(x)))
        x = self.last(self.nb(self.b(x)) + x)
        return self.nf(self.fc(x.mean((2, 3))))


def forced(monkeypatch, sparse=lambda layer: True, whole=2.0):
    """Decide without the clock: `sparse` says which layers win, `whole` the gain of the model."""

    def time_layer(dense, *rest):
        layer = dense[0] if isinstance(dense, nn.Sequential) else dense
        return (2.0, 1.0) if sparse(layer) else (1.0, 2.0)

    monkeypatch.setattr(choose, "time_layer", time_layer)
    monkeypatch.setattr(convert, "time_model", lambda *a: (whole, 1.0, whole))


def fused(model, x, **options):
    """The report of converting `model`, its outputs checked against those before."""
    with torch.no_grad():
        want = model(x)
        converted = sk.convert_to_sparse(model, x, cache=False, **options)
        got = converted(x)
    exact = {"rtol": 1e-11, "atol": 1e-12} if x.dtype == torch.float64 else {}
    torch.testing.assert_close(got, want, **exact)
    return sk.report(converted)
