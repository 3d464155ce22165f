"""Refit: prune like Wanda, then let least squares repair the layer."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import Pattern
from .. import scores
from ..regression import by_groups, least_squares
from ..targets import Layer
from .base import Method, zero_out
from .gradients import check_count
from .sparsegpt import gram


@dataclass(frozen=True)
class Refit(Method):
    """Regression-based reconstruction: kept weights minimise `||(W - W') X||^2` under the mask.

    The mask is Wanda's (`|w_ij| ||x_j||_2` within each output row), the regression that of He et
    al. 2017, arXiv:1707.06168, eq. 1, for W with the mask held, as in Boza 2024, arXiv:2401.02938.
    Where SparseGPT updates column by column, this solves for all kept weights of a row at once. See
    `sparsekern.reconstruct` to refit after any other method, with the dense model's outputs as
    goal. Memory: one float64 `(fan_in, fan_in)` matrix per layer of a stage.

    Attributes:
        ridge: Pull towards the weights before, over the mean squared input, >= 0.
        iterations: Conjugate gradient iterations, >= 1.
        sequential: As for Wanda: stage by stage on pruned inputs, or all on dense inputs at once.
    """

    ridge: float = 0.01
    iterations: int = 20
    sequential: bool = True
    scope: ClassVar[str] = "uniform"
    by_row: ClassVar[bool] = True
    needs: ClassVar[str] = "data"
    statistic: ClassVar = staticmethod(gram)

    def __post_init__(self):
        """Check the options."""
        if not isinstance(self.ridge, int | float) or not 0 <= self.ridge < math.inf:
            raise ValueError(f"prune: expected ridge >= 0, got {self.ridge!r}")
        check_count("iterations", self.iterations)

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by weight and input norm; `total` holds `(groups, fan_in, fan_in)` products."""
        norms = total.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        return scores.wanda(layer.weight, norms.to(dtype))

    def prune_layer(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Prune and refit one layer in place; returns the mask."""
        dense = by_groups(layer).clone()
        products = total.to(dense.dtype)
        mask = self.mask(layer, pattern, kept, total, by_row)
        grouped = mask.reshape(dense.shape)
        goal = dense, products, dense @ products
        found = least_squares(dense.where(grouped, 0), grouped, *goal, self.ridge, self.iterations)
        layer.weight.copy_(found.reshape(layer.weight.shape))
        zero_out(layer, mask)
        return mask
