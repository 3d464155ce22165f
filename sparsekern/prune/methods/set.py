"""SET: grow at random."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...patterns import Pattern
from ..targets import Layer
from .regrow import Regrow


@dataclass(frozen=True)
class SET(Regrow):
    """Sparse evolutionary training: grow at random (Mocanu et al. 2018, arXiv:1707.04780).

    Grown weights start at 0, as in RigL's comparison, where the paper draws them at random. What is
    dropped just now is as likely to grow as any other.
    """

    def growth(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Grow at random."""
        return self._draw(layer, layer.weight.numel()).view(layer.weight.shape)

    def unit_growth(self, layer: Layer, pattern: Pattern, total: Tensor | None) -> Tensor:
        """Grow units at random: means of many draws would favour units of few weights."""
        rows, cols, positions = pattern.grid(layer.weight.shape)
        return self._draw(layer, rows * cols * positions)

    def _draw(self, layer: Layer, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator).to(layer.weight.device)
