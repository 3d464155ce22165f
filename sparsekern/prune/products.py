"""Linear layers that multiply by their N:M weight while it is trained dense."""

import torch
from torch import Tensor, nn

from ..ops.nm_ste import nm_ste_linear
from ..patterns import NM
from ..patterns_nm import TransposableNM


class PrunedLinear(nn.Linear):
    """nn.Linear that prunes its weight to N:M by magnitude at every call and multiplies by that.

    A layer becomes one while `SRSTE(products=True)` trains it and is an nn.Linear again afterwards:
    its parameters, their names and hooks stay the same. Gradients reach all weights.

    Attributes:
        pruned_to: N, M, and whether the mask is transposable.
    """

    pruned_to: tuple[int, int, bool]

    def forward(self, x: Tensor) -> Tensor:
        """Y = x P(W)^T + b; under autocast in its dtype, as nn.Linear."""
        weight, bias = self.weight, self.bias
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return nm_ste_linear(x, weight, bias, *self.pruned_to)


def multiply_pruned(module: nn.Module, pattern: NM) -> None:
    """Let a layer multiply by its pruned weight, if it is an nn.Linear and no subclass of it."""
    if type(module) is nn.Linear:
        module.__class__ = PrunedLinear
    if type(module) is PrunedLinear:
        module.pruned_to = (pattern.n, pattern.m, isinstance(pattern, TransposableNM))


def multiply_dense(module: nn.Module) -> None:
    """Make such a layer an nn.Linear again."""
    if type(module) is PrunedLinear:
        module.__class__ = nn.Linear
        del module.pruned_to
