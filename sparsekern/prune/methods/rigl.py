"""RigL: grow where the gradient is largest."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..targets import Layer
from .regrow import Regrow


@dataclass(frozen=True)
class RigL(Regrow):
    """Grow the weights with the largest gradient (Evci et al. 2020, arXiv:1911.11134, algorithm 1).

    The gradient is that of the last optimizer step before the update, by all weights. Defaults as
    published: fraction 0.3, an update every 100 steps, budgets by the Erdos-Renyi-kernel rule; let
    updates end after 75 % of the training (`schedule=Constant(sparsity, 100, end)`). With a tiled
    pattern units move by their mean magnitudes and gradients; with N:M weights move within groups.
    Dense gradients are looked at only in the step before an update.
    """

    watches: ClassVar[str] = "updates"

    def observe(self, layer: Layer, gradient: Tensor, seen: Tensor | None) -> Tensor:
        """Keep the size of the latest gradient."""
        return gradient.abs()

    def growth(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Grow by the size of the gradient."""
        if total is None:
            raise ValueError(
                f"prune: expected a gradient of layer {layer.name!r} in the step before an update "
                "by method 'rigl', got none; add layers that are not trained to ignore"
            )
        return total
