"""FPGM: filters that others can replace."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import Filter, Pattern
from ..targets import Layer
from .base import Method
from .skeletonization import only_units


@dataclass(frozen=True)
class FPGM(Method):
    """Score a filter by the sum of its distances to all others of the layer (He et al. 2019).

    Filter pruning via the geometric median, arXiv:1811.00250, eq. 7: the filters nearest to the
    geometric median go, as the others can stand in for them, however large they are. With pattern
    `channel` the same for input channels. Takes `units^2` distances per layer. Sums of distances do
    not compare between layers, hence scope `uniform`.
    """

    scope: ClassVar[str] = "uniform"

    def misfit(self, pattern: Pattern) -> str | None:
        """Units are filters or channels."""
        return only_units("fpgm", pattern)

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Sum of Euclidean distances to the other units, `(units,)`."""
        weight = layer.weight if isinstance(pattern, Filter) else layer.weight.transpose(0, 1)
        points = weight.flatten(1)
        points = points if points.dtype == torch.float64 else points.float()
        # The fast way, by products, loses the small distances that matter here.
        return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
