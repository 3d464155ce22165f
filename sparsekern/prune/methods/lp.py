"""Norms of units: filters, channels, kernels, blocks, vectors."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import NM, Pattern
from ..targets import Layer
from .base import Method


@dataclass(frozen=True)
class Lp(Method):
    """Score a unit by the Lp norm of its weights (filters with p = 1: Li et al. 2017).

    arXiv:1608.08710. Norms do not compare between layers, hence scope `uniform`; for a global
    ranking `normalize` divides them by the L2 norm of all norms of the layer (Molchanov et al.
    2017, arXiv:1611.06440, section 2.2). Unlike `magnitude`, a larger unit has a larger norm.

    Attributes:
        p: Order of the norm, > 0, or `math.inf` for the largest magnitude.
        normalize: Make norms of different layers comparable.
    """

    p: float = 2.0
    normalize: bool = True
    scope: ClassVar[str] = "uniform"

    def __post_init__(self):
        """Check the option."""
        if not isinstance(self.p, int | float) or not self.p > 0:
            raise ValueError(f"prune: expected p > 0, got {self.p!r}")

    def misfit(self, pattern: Pattern) -> str | None:
        """N:M has no units whose norm could be taken."""
        if isinstance(pattern, NM):
            return f"method 'lp' needs units to take norms of, got pattern {pattern}"
        return None

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Norm of every unit, float `(units,)`."""
        sizes = pattern.unit_sizes(layer.weight.shape)
        sizes = sizes if isinstance(sizes, int) else sizes.to(layer.weight.device)
        magnitude = layer.weight.abs().double()
        if self.p == math.inf:
            norms = pattern.unit_maxima(magnitude)
        else:
            norms = (pattern.unit_scores(magnitude**self.p) * sizes) ** (1 / self.p)
        length = torch.linalg.vector_norm(norms)
        return norms / length if self.normalize and length > 0 else norms
