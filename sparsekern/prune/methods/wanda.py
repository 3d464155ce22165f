"""Wanda: magnitude times the norm of the input, compared within each output."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import scores
from ..targets import Layer
from .base import Method


def _squared_norms(layer: Layer, rows: Tensor) -> Tensor:
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).double() ** 2


@dataclass(frozen=True)
class Wanda(Method):
    """Score `|w_ij| * ||x_j||_2`, no weight update (Sun et al. 2023, arXiv:2306.11695).

    Each output row (with a tiled pattern: each row of units) loses the same share. In a convolution
    x_j are the inputs at one channel and kernel position, as unfolding lays them out.

    Attributes:
        sequential: Prune stage by stage, each with inputs from the pruned stages before it; else
            all layers see inputs of the dense model, in a single pass.
    """

    sequential: bool = True
    scope: ClassVar[str] = "uniform"
    by_row: ClassVar[bool] = True
    needs: ClassVar[str] = "data"
    statistic: ClassVar = staticmethod(_squared_norms)

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by weight and input norm; `total` holds `(groups, fan_in)` squared norms."""
        dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        return scores.wanda(layer.weight, total.sqrt().to(dtype))
