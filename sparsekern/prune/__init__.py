"""Pruning: score x pattern x scope x schedule x update rule."""

from .api import prune
from .report import PrunedLayer, PruneReport

__all__ = ["PruneReport", "PrunedLayer", "prune"]
