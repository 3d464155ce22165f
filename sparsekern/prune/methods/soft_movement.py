"""Soft movement pruning: scores that are trained, with a regulariser, against a threshold."""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...patterns import NM, Pattern
from ..schedules import Schedule
from ..targets import Layer
from .movement import Movement

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True)
class SoftMovement(Movement):
    """Keep where `sigma(S)` is above a threshold, with S trained (Sanh et al. 2020, section 4).

    arXiv:2005.07683. Scores start at 0 and are trained by Adam, as in the authors' code, on the
    loss, whose gradient goes straight through the mask (`dL/dS = dL/dW' W`), and on a regulariser,
    `strength` times the mean of `sigma(S)` over each layer, that pushes all scores down. How the
    zeros spread over the layers follows from the scores.

    Without a threshold it is set at each update so that the schedule's sparsity is met exactly,
    over all layers together. With one, as published, the sparsity follows from `strength`, and of
    the schedule's only the progress counts: threshold and strength grow with its sparsity to their
    final values. See the report for what came out; every layer keeps at least one unit.

    Attributes:
        threshold: In (0, 1) for `sigma(S)`, 0.1 as published, or None.
        strength: Of the regulariser, >= 0.
        lr: Learning rate of the scores, > 0; 0.01 as published, for ten thousands of steps.
        step: Optimizer steps so far.
        share: Progress of the schedule, from 0 to 1.
    """

    threshold: float | None = None
    strength: float = 1.0
    lr: float = 0.01
    step: int = field(default=0, init=False)
    share: float = field(default=0.0, init=False)

    def __post_init__(self):
        """Check the options."""
        if self.threshold is not None and not (_is_number(self.threshold) and self.threshold < 1):
            raise ValueError(f"prune: expected threshold in (0, 1) or None, got {self.threshold!r}")
        if self.strength != 0 and not _is_number(self.strength):
            raise ValueError(f"prune: expected strength >= 0, got {self.strength!r}")
        if not _is_number(self.lr):
            raise ValueError(f"prune: expected lr > 0, got {self.lr!r}")

    @property
    def scope(self) -> str:
        """Over all layers together where the sparsity is met exactly."""
        return "global" if self.threshold is None else "uniform"

    @property
    def per_layer(self) -> bool:
        """A threshold knows no ranking."""
        return self.threshold is not None

    def misfit(self, pattern: Pattern) -> str | None:
        """N:M fixes how many stay."""
        if self.threshold is not None and isinstance(pattern, NM):
            return f"method 'soft_movement' with a threshold needs units, got pattern {pattern}"
        return None

    def at(self, step: int, schedule: Schedule) -> "SoftMovement":
        """Give the method with the progress at this step."""
        now = copy.copy(self)
        object.__setattr__(now, "step", step)
        share = schedule.sparsity(step) / schedule.final if schedule.final else 0.0
        object.__setattr__(now, "share", share)
        return now

    def observe(self, layer: Layer, gradient: Tensor, seen: Tensor | None) -> Tensor:
        """Make a step of Adam; `seen` is the scores and both moments, `(3, out, in, *kernel)`."""
        slope = gradient * layer.weight
        slope = slope.to(torch.promote_types(slope.dtype, torch.float32))
        if seen is None:
            seen = slope.new_zeros(3, *slope.shape)
        scores, first, second = seen
        gate = scores.sigmoid()
        slope = slope + self.strength * self.share / gate.numel() * gate * (1 - gate)
        first.lerp_(slope, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
        rest = [1 - beta ** (self.step + 1) for beta in BETAS]
        spread = (second / rest[1]).sqrt_().add_(EPS)
        scores.addcdiv_(first, spread, value=-self.lr / rest[0])
        return seen

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by S; a unit by its mean."""
        return super().score(layer, None if total is None else total[0])

    def mask(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Choose by the threshold, if there is one, whatever the budget."""
        if self.threshold is None:
            return super().mask(layer, pattern, kept, total, by_row)
        scores = self.unit_ranks(layer, pattern, total)
        chosen = scores.sigmoid() > self.threshold * self.share
        chosen[scores.argmax()] = True
        mask = pattern.expand(chosen, layer.weight.shape)
        return mask if layer.alive is None else mask & layer.alive


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
