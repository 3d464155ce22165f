"""Magnitude pruning: small weights go."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import scores
from ..targets import Layer
from .base import Method


@dataclass(frozen=True)
class Magnitude(Method):
    """Score `|w|^p`; a unit of several weights scores by its mean (Han et al. 2015).

    With p = 1 filters rank by their L1 norm (Li et al. 2017, arXiv:1608.08710), with p = 2 by L2.
    While training with a gradual schedule, dropped weights keep their values aside and return when
    others fall below them (Zhu & Gupta 2017, arXiv:1710.01878).

    Attributes:
        p: Power, > 0.
    """

    p: float = 1.0
    returning: ClassVar[bool] = True

    def __post_init__(self):
        """Check the option."""
        if not isinstance(self.p, int | float) or not self.p > 0:
            raise ValueError(f"prune: expected p > 0, got {self.p!r}")

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by magnitude alone."""
        return scores.magnitude(layer.weight, self.p)
