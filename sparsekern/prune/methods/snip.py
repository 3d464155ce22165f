"""SNIP: how much the loss feels each connection, before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...patterns import Pattern
from ..targets import Layer
from ..task import Task
from .base import Method
from .gradients import check_count, mean_gradients


@dataclass(frozen=True)
class SNIP(Method):
    """Score `|dL/dc|` of gates `c = 1` on the weights, that is `|g w|` (Lee et al. 2019).

    arXiv:1810.02340, eq. 5. Gradients are summed with their sign over all batches, and the absolute
    value comes last. A unit scores by the mean over its weights. With several iterations, as in
    SNIP-it and iterative SNIP (arXiv:2006.00896, arXiv:2006.09081), densities fall geometrically
    and each round measures the network that the last one left: needed above about 99 %.

    Attributes:
        iterations: Rounds of scoring and pruning, >= 1.
        unit_gates: One gate per unit instead of one per weight: `|sum of g w over the unit|`.
        training: Score in training mode (batch statistics, dropout), not in eval mode as published.
    """

    iterations: int = 1
    unit_gates: bool = False
    training: bool = False
    needs: ClassVar[str] = "loss"

    def __post_init__(self):
        """Check the options."""
        check_count("iterations", self.iterations)

    @property
    def rounds(self) -> int:
        """As many as `iterations`."""
        return self.iterations

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor]:
        """Gradient of every gate, with its sign: mean over the batches of `g w`."""
        with task.scoring(layers, self.training):
            gradients = mean_gradients(task, layers)
        return [g * layer.weight for g, layer in zip(gradients, layers)]

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by the size of the gate's gradient."""
        return total.abs()

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Mean over the weights of a unit, of absolute values or with sign."""
        if self.unit_gates:
            return pattern.unit_scores(total).abs()
        return super().unit_scores(layer, pattern, total)
