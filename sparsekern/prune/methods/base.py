"""What a pruning method is: five choices, of which most methods make only the first."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import NM, Pattern
from ...ranking import keep
from ..scores import rank_in_rows
from ..targets import Layer


class Method:
    """Base of all methods. A subclass is a dataclass whose fields are the method's options.

    The five choices: `score` (what matters), `misfit` (which patterns it can serve), `scope` and
    `by_row` (what is compared with what), the schedule (one-shot for the methods of `prune`), and
    `prune_layer` (what happens to the weights).

    Attributes:
        scope: Scope of the published method, used when the caller names none.
        by_row: Compare units within each output row unless the scope is global.
        statistic: None, or a function `(layer, rows) -> float64 tensor` summed over the calibration
            data, with rows `(groups, T, fan_in)`; its sum is what `score` and `prune_layer` get.
    """

    scope: ClassVar[str] = "global"
    by_row: ClassVar[bool] = False
    statistic: ClassVar[Callable[[Layer, Tensor], Tensor] | None] = None

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score every weight: float of the weight's shape, larger = more important."""
        raise NotImplementedError

    def misfit(self, pattern: Pattern) -> str | None:
        """Say why the method cannot serve a pattern; None if it can."""
        return None

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Score every unit of a tiled pattern, float `(units,)` without NaN."""
        return refuse_nan(layer, pattern.unit_scores(self.score(layer, total)))

    def mask(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Choose what a layer keeps under a budget of kept weights (N:M fixes its own)."""
        if isinstance(pattern, NM):
            return pattern.mask(refuse_nan(layer, self.score(layer, total)))
        shape = layer.weight.shape
        scores, sizes = self.unit_scores(layer, pattern, total), pattern.unit_sizes(shape)
        if by_row:
            scores = rank_in_rows(scores, pattern.grid(shape)[0], sizes)
        return pattern.expand(keep(scores, sizes, kept), shape)

    def prune_layer(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Prune one layer in place after its statistic is known; returns the mask."""
        mask = self.mask(layer, pattern, kept, total, by_row)
        zero_out(layer, mask)
        return mask


def zero_out(layer: Layer, mask: Tensor) -> None:
    """Set the dropped weights to +0; a product with the mask would keep NaN and make -0."""
    with torch.no_grad():
        layer.weight.masked_fill_(~mask.to(layer.weight.device), 0)


def refuse_nan(layer: Layer, scores: Tensor) -> Tensor:
    """Pass scores through unless they hold NaN."""
    if bool(torch.isnan(scores).any()):
        raise ValueError(f"prune: expected scores without NaN in layer {layer.name!r}, got NaN")
    return scores
