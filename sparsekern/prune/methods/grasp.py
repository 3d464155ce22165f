"""GraSP: keep the gradient flowing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...patterns import Pattern
from ..targets import Layer
from ..task import Task
from .base import Method
from .gradients import mean_gradients


@dataclass(frozen=True)
class GraSP(Method):
    """Score `w (H g)`, how much gradient norm goes with a weight (Wang et al. 2020).

    arXiv:2002.07376, eq. 8 (there `-w (H g)`, and the highest go). Signed: a negative score means
    that the gradient norm grows without the weight. g is the mean gradient over all batches and H
    the Hessian over the pruned weights. A unit scores by the mean over its weights.

    Attributes:
        temperature: Outputs are divided by it before the loss, > 0; 200 as published, for logits.
        training: Score in training mode (batch statistics, dropout) instead of eval mode.
    """

    temperature: float = 200.0
    training: bool = False
    needs: ClassVar[str] = "loss"

    def __post_init__(self):
        """Check the options."""
        if not isinstance(self.temperature, int | float) or not self.temperature > 0:
            raise ValueError(f"prune: expected temperature > 0, got {self.temperature!r}")

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor]:
        """Mean over the batches of `w (H g)`."""
        with task.scoring(layers, self.training):
            flow = mean_gradients(task, layers, self.temperature)
            task.average(flow)
            sums: list[Tensor] = []
            for loss in task.losses(self.temperature):
                gradients = task.gradients(loss, layers, graph=True)
                product = sum((g * f).sum() for g, f in zip(gradients, flow))
                found = task.gradients(product, layers, partial=True)
                sums = [s + h for s, h in zip(sums, found)] if sums else found
        count = len(task.batches)
        return [layer.weight * h / count for layer, h in zip(layers, sums)]

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by the gradient flow that goes with each weight."""
        return total
