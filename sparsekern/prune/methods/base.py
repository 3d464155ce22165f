"""What a pruning method is: five choices, of which most methods make only the first."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...patterns import NM, Pattern
from ...ranking import keep
from ..bits import drop_
from ..schedules import OneShot, Schedule
from ..scores import rank_in_rows
from ..targets import Layer
from ..task import Task


class Method:
    """Base of all methods. A subclass is a dataclass whose fields are the method's options.

    The five choices: `score` (what matters), `misfit` (which patterns it can serve), `scope` and
    `by_row` (what is compared with what), `rounds` and `schedule` (when), and the update rule
    (`prune_layer`, `returning`, `trains_dropped`, `watches`).

    Attributes:
        needs: What must be given: `""`, `"data"`, or `"loss"` for data and a loss.
        scope: Scope of the published method, used when the caller names none.
        per_layer: The method moves weights within layers, so a global scope says nothing to it.
        by_row: Compare units within each output row unless the scope is global.
        statistic: None, or a function `(layer, rows) -> float64 tensor` summed over the calibration
            data, with rows `(groups, T, fan_in)`; its sum is what `score` and `prune_layer` get.
        one_shot: Whether `prune` can run it; the others need training and the `Pruner`.
        returning: Dropped weights keep their values aside and may return at the next update.
        trains_dropped: Values kept aside are trained on, by the gradient at the pruned weights.
        regrows: Takes weights back that were 0 already when pruning began.
        keeps: Whether masks are the zeros that are there, and no budget counts.
        watches: When `observe` sees gradients: `""`, before `"updates"`, or at all `"steps"`.
    """

    needs: ClassVar[str] = ""
    scope: ClassVar[str] = "global"
    per_layer: ClassVar[bool] = False
    by_row: ClassVar[bool] = False
    statistic: ClassVar[Callable[[Layer, Tensor], Tensor] | None] = None
    one_shot: ClassVar[bool] = True
    returning: ClassVar[bool] = False
    trains_dropped: ClassVar[bool] = False
    regrows: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    watches: ClassVar[str] = ""

    @property
    def rounds(self) -> int:
        """Rounds of scoring and pruning that make up one update, with densities falling evenly."""
        return 1

    @property
    def starts_anywhere(self) -> bool:
        """Say whether the first masks disregard the zeros that are there altogether."""
        return False

    def schedule(self, sparsity: float) -> Schedule:
        """Schedule of the published method, used when the caller gives none."""
        return OneShot(sparsity)

    def at(self, step: int, schedule: Schedule) -> "Method":
        """Give the method as it is after `step` steps, for update rules that change with time."""
        return self

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor | None]:
        """Measure what `score` needs over the whole model, one tensor per layer; each round anew.

        Tensors are averaged over the ranks before `score` gets them.
        """
        return [None] * len(layers)

    def observe(self, layer: Layer, gradient: Tensor, seen: Tensor | None) -> Tensor:
        """Fold a gradient by all weights, dropped ones too, into what `score` will get.

        Args:
            layer: Its weight holds the values that are kept aside, too.
            gradient: `(out, in, *kernel)`.
            seen: What the last call gave.
        """
        raise NotImplementedError

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score every weight: float of the weight's shape, larger = more important."""
        raise NotImplementedError

    def misfit(self, pattern: Pattern) -> str | None:
        """Say why the method cannot serve a pattern; None if it can."""
        return None

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Score every unit of a tiled pattern, float `(units,)`."""
        return pattern.unit_scores(self.score(layer, total))

    def unit_ranks(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Give the scores of units, checked for NaN, with `-inf` where nothing is alive."""
        scores = refuse_nan(layer, self.unit_scores(layer, pattern, total))
        if layer.alive is None:
            return scores
        return scores.masked_fill(pattern.unit_scores(layer.alive.float()) == 0, -torch.inf)

    def mask(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Choose what a layer keeps under a budget of kept weights (N:M fixes its own)."""
        if isinstance(pattern, NM):
            scores = refuse_nan(layer, self.score(layer, total))
            if layer.alive is not None:
                scores = scores.masked_fill(~layer.alive, -torch.inf)
            chosen = pattern.mask(scores)
        else:
            shape = layer.weight.shape
            scores, sizes = self.unit_ranks(layer, pattern, total), pattern.unit_sizes(shape)
            if by_row:
                scores = rank_in_rows(scores, pattern.grid(shape)[0], sizes)
            chosen = pattern.expand(keep(scores, sizes, kept), shape)
        return chosen if layer.alive is None else chosen & layer.alive

    def prune_layer(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Prune one layer in place after its statistic is known; returns the mask."""
        mask = self.mask(layer, pattern, kept, total, by_row)
        zero_out(layer, mask)
        return mask

    def installed(self, layer: Layer, pattern: Pattern | None) -> None:
        """Take note that a Pruner gave the layer a mask of a pattern; None: none, or no more."""

    def settle(self, model: nn.Module, layer: Layer, mask: Tensor) -> None:
        """Set to zero what goes with dropped weights (slimming: the BatchNorm channels)."""


def zero_out(layer: Layer, mask: Tensor) -> None:
    """Set the dropped weights to +0; a product with the mask would keep NaN and make -0."""
    with torch.no_grad():
        drop_(layer.weight, mask.to(layer.weight.device))


def refuse_nan(layer: Layer, scores: Tensor) -> Tensor:
    """Pass scores through unless they hold NaN."""
    if bool(torch.isnan(scores).any()):
        raise ValueError(f"prune: expected scores without NaN in layer {layer.name!r}, got NaN")
    return scores
