"""Random pruning: the baseline without which no result means much."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...patterns import Pattern
from ..targets import Layer
from .base import Method


@dataclass(frozen=True)
class Random(Method):
    """Every unit gets an independent uniform score, drawn on the CPU in the order of the layers.

    Attributes:
        seed: Seed of a new generator, used if none is given.
        generator: CPU generator to draw from.
    """

    seed: int = 0
    generator: torch.Generator | None = field(default=None, compare=False)

    def __post_init__(self):
        """Make the generator."""
        if self.generator is None:
            # A frozen dataclass has no other way to fill in a derived field.
            object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))
        elif not isinstance(self.generator, torch.Generator) or self.generator.device.type != "cpu":
            raise TypeError(f"prune: expected generator on the CPU, got {self.generator!r}")

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Draw a score for every weight."""
        return self._draw(layer.weight.numel(), layer).view(layer.weight.shape)

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Draw a score for every unit: means of many draws would favour units of few weights."""
        rows, cols, positions = pattern.grid(layer.weight.shape)
        return self._draw(rows * cols * positions, layer)

    def _draw(self, count: int, layer: Layer) -> Tensor:
        return torch.rand(count, generator=self.generator).to(layer.weight.device)
