"""Models for the tests of measuring, and one comparison of two of them."""

import torch
from torch import nn

from sparsekern.measure import compare


def mlp(width=64, bias=True):
    return nn.Sequential(nn.Linear(32, width, bias), nn.ReLU(), nn.Linear(width, 8, bias))


def compared():
    torch.manual_seed(0)
    return compare(mlp(256), mlp(64), torch.randn(4, 32), budget_s=0.05, energy="modelled")
