"""Movement pruning: weights that move away from zero stay."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..targets import Layer
from .base import Method


@dataclass(frozen=True)
class Movement(Method):
    """Score `-sum of (dL/dw) w` over the steps of fine-tuning (Sanh et al. 2020, eq. 4).

    arXiv:2005.07683: what training the scores with the straight-through estimator comes to, up to a
    factor that no ranking sees, if plain SGD trains them (Adam, as in the authors' code: see
    `soft_movement`). Dropped weights keep their values aside, their scores go on, and
    they may return. For fine-tuning a pretrained model with a gradual schedule that starts after
    some steps; per layer, as published.
    """

    scope: ClassVar[str] = "uniform"
    one_shot: ClassVar[bool] = False
    returning: ClassVar[bool] = True
    watches: ClassVar[str] = "steps"

    def observe(self, layer: Layer, gradient: Tensor, seen: Tensor | None) -> Tensor:
        """Add up `-(dL/dw) w`."""
        product = gradient * layer.weight
        if seen is None:
            dtype = torch.promote_types(product.dtype, torch.float32)
            seen = torch.zeros_like(product, dtype=dtype)
        return seen.sub_(product)

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by the movement seen so far."""
        if total is None:
            raise ValueError(
                f"prune: expected training steps before the first update of layer {layer.name!r} "
                "by movement pruning, got none; use a schedule that starts later"
            )
        return total
