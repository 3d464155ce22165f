"""First-order Taylor pruning: the squared change of the loss without a unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import NM, Pattern
from ..targets import Layer
from ..task import Task
from .base import Method


@dataclass(frozen=True)
class Taylor(Method):
    """Score `(sum of g w over the unit)^2`, averaged over the batches (Molchanov et al. 2019).

    arXiv:1906.10771, eq. 8: the square is taken in each batch, where SNIP adds up gradients first,
    so smaller batches see more of what cancels between samples. The square is divided by the unit's
    size, so that units of different size compare by what they cost per weight.

    Attributes:
        training: Score in training mode (batch statistics, dropout) instead of eval mode.
    """

    training: bool = False
    needs: ClassVar[str] = "loss"

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor]:
        """Mean squares: `(units,)` per layer, or the weight's shape for N:M."""
        sums: list[Tensor] = []
        with task.scoring(layers, self.training):
            for loss in task.losses():
                pairs = zip(task.gradients(loss, layers), layers)
                with torch.no_grad():
                    squares = [_square(g * layer.weight, pattern) for g, layer in pairs]
                sums = [s + q for s, q in zip(sums, squares)] if sums else squares
        return [s / len(task.batches) for s in sums]

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score weight by weight, as N:M wants it."""
        return total

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Score units by what was measured on them."""
        return total


def _square(products: Tensor, pattern: Pattern) -> Tensor:
    if isinstance(pattern, NM):
        return products**2
    # (sum)^2 / size = mean^2 * size
    sizes = pattern.unit_sizes(products.shape)
    sizes = sizes if isinstance(sizes, int) else sizes.to(products.device)
    return pattern.unit_scores(products) ** 2 * sizes
