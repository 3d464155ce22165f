"""Linear layers that multiply by their N:M weight while it is trained dense, and its masks."""

import torch
from torch import Tensor, nn

from ..graph_leaf import GraphLeaf, Proxy
from ..ops.nm_ste import nm_prune, nm_ste_linear
from ..patterns import NM
from ..patterns_nm import TransposableNM


class PrunedLinear(GraphLeaf, nn.Linear):
    """nn.Linear that prunes its weight to N:M by magnitude at every call and multiplies by that.

    A layer becomes one while `SRSTE(products=True)` trains it and is an nn.Linear again afterwards:
    its parameters, their names and hooks stay the same. Gradients reach all weights.

    Attributes:
        pruned_to: N, M, and whether the mask is transposable.
    """

    pruned_to: tuple[int, int, bool]

    def forward(self, x: Tensor) -> Tensor:
        """Y = x P(W)^T + b; under autocast in its dtype, as nn.Linear."""
        if isinstance(x, Proxy):
            return self.traced(x)
        weight, bias = self.weight, self.bias
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return nm_ste_linear(x, weight, bias, *self.pruned_to)


def mask_by_kernel(sizes: Tensor, pattern: NM) -> Tensor:
    """The mask `(out, in)` of the largest sizes >= 0, as `pattern.mask`, by the kernel of a GPU.

    A transposable one has the largest sums in float32, which may differ where two sums are equal
    but for rounding.
    """
    # Above 0, so that what is kept can be told from what is dropped.
    sizes = sizes.float().clamp_min(torch.finfo(torch.float32).tiny)
    return nm_prune(sizes, pattern.n, pattern.m, isinstance(pattern, TransposableNM)) != 0


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
