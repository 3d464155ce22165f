"""SR-STE: train all weights behind a mask that follows them."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import scores
from ..schedules import Constant, Schedule
from ..targets import Layer
from .base import Method


@dataclass(frozen=True)
class SRSTE(Method):
    """Sparse-refined straight-through estimator (Zhou et al. 2021, arXiv:2102.04010, eq. 9).

    The forward pass sees the masked weights, the gradient by them updates all weights, and
    `decay * w` is added to the gradient of the dropped ones, before the optimizer makes momentum of
    it. Masks by magnitude, anew after every step (default schedule). Made for N:M, works with any
    pattern; with `decay=0` it is the plain straight-through estimator. When the schedule ends,
    masks are fixed and dropped weights stay 0.

    Attributes:
        decay: Pull on dropped weights, >= 0; 2e-4 as published.
    """

    decay: float = 2e-4
    scope: ClassVar[str] = "uniform"
    one_shot: ClassVar[bool] = False
    returning: ClassVar[bool] = True
    trains_dropped: ClassVar[bool] = True

    def __post_init__(self):
        """Check the option."""
        if not isinstance(self.decay, int | float) or not 0 <= self.decay < math.inf:
            raise ValueError(f"prune: expected decay >= 0, got {self.decay!r}")

    def schedule(self, sparsity: float) -> Schedule:
        """Constant sparsity with an update after every step."""
        return Constant(sparsity, every=1)

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by magnitude."""
        return scores.magnitude(layer.weight)
