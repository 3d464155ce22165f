"""SR-STE: train all weights behind a mask that follows them."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...patterns import NM, Pattern
from .. import scores
from ..products import mask_by_kernel, multiply_dense, multiply_pruned
from ..schedules import Constant, Schedule
from ..targets import Layer
from .base import Method, refuse_nan


@dataclass(frozen=True)
class SRSTE(Method):
    """Sparse-refined straight-through estimator (Zhou et al. 2021, arXiv:2102.04010, eq. 9).

    The forward pass sees the masked weights, the gradient by them updates all weights, and `decay *
    w` is added to the gradient of the dropped ones, before the optimizer makes momentum of it.
    Masks by magnitude, anew after every step (default schedule). Made for N:M, works with any
    pattern; zeros that were there before are trained, too. With `decay=0` it is the plain
    straight-through estimator. When the schedule ends, masks are fixed and dropped weights stay 0.

    With `products` linear layers multiply by the N:M weight itself: it is pruned (again) and packed
    in every forward pass, so that a GPU computes the product on its 2:4 tensor cores, and with the
    pattern 2:4T the gradient of the input as well (Hu et al. 2024, arXiv:2404.01847). The gradient
    of the weight stays dense, as the method wants it. Without rounding the numbers are those of
    `products=False`. A GPU multiplies 2:4 in float16 or bfloat16, also under autocast, and where
    pruning, packing and product together are faster than the dense product; elsewhere, as on the
    CPU, the products are dense and pruning again costs time. Convolutions and subclasses of
    nn.Linear are multiplied as ever.

    Attributes:
        decay: Pull on dropped weights, >= 0; 2e-4 as published.
        products: Whether nn.Linear layers multiply by their N:M weights; see `PrunedLinear`.
    """

    decay: float = 2e-4
    products: bool = False
    scope: ClassVar[str] = "uniform"
    one_shot: ClassVar[bool] = False
    returning: ClassVar[bool] = True
    regrows: ClassVar[bool] = True
    trains_dropped: ClassVar[bool] = True

    def __post_init__(self):
        """Check the options."""
        if not isinstance(self.products, bool):
            raise ValueError(f"prune: expected products to be a bool, got {self.products!r}")
        if not isinstance(self.decay, int | float) or not 0 <= self.decay < math.inf:
            raise ValueError(f"prune: expected decay >= 0, got {self.decay!r}")

    def schedule(self, sparsity: float) -> Schedule:
        """Constant sparsity with an update after every step."""
        return Constant(sparsity, every=1)

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by magnitude."""
        return scores.magnitude(layer.weight)

    def mask(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Choose as every method; 2:4 on a GPU in one pass of a kernel, as it is due every step."""
        weight = layer.weight
        if weight.is_cuda and weight.dim() == 2 and isinstance(pattern, NM):
            if (pattern.n, pattern.m) == (2, 4):
                return mask_by_kernel(refuse_nan(layer, self.score(layer, total)), pattern)
        return super().mask(layer, pattern, kept, total, by_row)

    def misfit(self, pattern: Pattern) -> str | None:
        """Only N:M weights are multiplied as such."""
        if self.products and not isinstance(pattern, NM):
            return f"expected an N:M pattern with products=True, got {pattern}"
        return None

    def installed(self, layer: Layer, pattern: Pattern | None) -> None:
        """Let the layer multiply by its pruned weight, or as ever."""
        if self.products and pattern is not None:
            multiply_pruned(layer.module, pattern)
        else:
            multiply_dense(layer.module)
