"""What RigL and SET share: drop the smallest weights, grow as many elsewhere."""

import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import NM, Pattern
from ...ranking import keep
from ..schedules import Constant, Schedule
from ..targets import Layer
from .base import Method, refuse_nan
from .magnitude import Magnitude
from .random import Random

STARTS = ("random", "magnitude")


@dataclass(frozen=True)
class Regrow(Method):
    """Dynamic sparse training with a budget per layer that stays as the schedule says.

    At each update a share of the kept weights with the smallest magnitude is dropped and the budget
    filled up again by `growth`. Grown weights start at 0; a weight that was dropped just now may
    come back with its value. Zeros that were there before may grow, as all others. The share is
    `fraction / 2 (1 + cos(pi t / end))` for a schedule that ends, `fraction` for one that does not.

    Attributes:
        fraction: Share of the kept weights that moves, in [0, 1].
        start: Masks at the first update, `"random"` for training from scratch, or `"magnitude"`.
        seed: Seed of a new generator, used if none is given.
        generator: CPU generator to draw from.
        share: Share that moves now; follows from the step.
    """

    fraction: float = 0.3
    start: str = "random"
    seed: int = 0
    generator: torch.Generator | None = field(default=None, compare=False)
    share: float = field(default=0.0, init=False)
    scope: ClassVar[str] = "erk"
    per_layer: ClassVar[bool] = True
    one_shot: ClassVar[bool] = False
    regrows: ClassVar[bool] = True

    def __post_init__(self):
        """Check the options and make the generator."""
        if not isinstance(self.fraction, int | float) or not 0 <= self.fraction <= 1:
            raise ValueError(f"prune: expected fraction in [0, 1], got {self.fraction!r}")
        if self.start not in STARTS:
            known = ", ".join(STARTS)
            raise ValueError(f"prune: expected start one of {known}; got {self.start!r}")
        # A frozen dataclass has no other way to fill in a derived field.
        object.__setattr__(self, "generator", Random(self.seed, self.generator).generator)

    @property
    def starts_anywhere(self) -> bool:
        """True for random first masks."""
        return self.start == "random"

    def schedule(self, sparsity: float) -> Schedule:
        """Constant sparsity with an update every 100 steps."""
        return Constant(sparsity, every=100)

    def at(self, step: int, schedule: Schedule) -> "Regrow":
        """Give the method with the share of weights that moves at this step."""
        share = self.fraction
        if schedule.last:
            share *= (1 + math.cos(math.pi * min(step / schedule.last, 1))) / 2
        now = copy.copy(self)
        object.__setattr__(now, "share", share)
        return now

    def growth(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score every weight that could grow, in the weight's shape."""
        raise NotImplementedError

    def unit_growth(self, layer: Layer, pattern: Pattern, total: Tensor | None) -> Tensor:
        """Score every unit that could grow, `(units,)`."""
        return pattern.unit_scores(self.growth(layer, total))

    def mask(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Draw the first mask, then drop and grow."""
        if layer.alive is None:
            first = Magnitude() if self.start == "magnitude" else Random(generator=self.generator)
            return first.mask(layer, pattern, kept, None, False)
        move = self._move_in_groups if isinstance(pattern, NM) else self._move_units
        return move(layer, pattern, kept, total)

    def _move_units(self, layer, pattern, kept, total) -> Tensor:
        shape = layer.weight.shape
        sizes, alive = pattern.unit_sizes(shape), pattern.unit_scores(layer.alive.float()) > 0
        magnitude = pattern.unit_scores(layer.weight.abs())
        ranks = refuse_nan(layer, magnitude).masked_fill(~alive, -torch.inf)
        held = keep(ranks, sizes, kept * (1 - self.share)) & alive
        growth = refuse_nan(layer, self.unit_growth(layer, pattern, total))
        chosen = keep(growth.masked_fill(held, torch.inf), sizes, kept)
        return pattern.expand(chosen, shape)

    def _move_in_groups(self, layer, pattern, kept, total) -> Tensor:
        magnitude = refuse_nan(layer, layer.weight.abs())
        ranks = magnitude.masked_fill(~layer.alive, -torch.inf).flatten()
        held = keep(ranks, 1, kept * (1 - self.share)).view_as(magnitude) & layer.alive
        growth = refuse_nan(layer, self.growth(layer, total))
        # Each group is filled up to its N, so that what is dropped returns within the group.
        return pattern.mask(growth.masked_fill(held, torch.inf))
