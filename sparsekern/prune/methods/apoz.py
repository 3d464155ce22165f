"""APoZ: how often a unit is silent."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...patterns import Filter, Pattern
from ..targets import Layer
from ..task import Task
from .base import Method
from .skeletonization import only_units

RECTIFIERS = (nn.ReLU, nn.ReLU6)
# What may stand between a layer and its ReLU.
PASSING = (_BatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)


@dataclass(frozen=True)
class APoZ(Method):
    """Score `1 - APoZ`, with APoZ the average share of zeros after ReLU (Hu et al. 2016).

    arXiv:1607.03250, eq. 1. Pattern `filter` looks at the `nn.ReLU` module behind a layer
    (BatchNorm and dropout may lie between), `channel` at what enters a layer. Measured in eval
    mode.
    """

    needs: ClassVar[str] = "data"
    scope: ClassVar[str] = "uniform"

    def misfit(self, pattern: Pattern) -> str | None:
        """Units are filters or channels."""
        return only_units("apoz", pattern)

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor]:
        """Share of nonzeros, `(units,)` per layer."""
        counts: dict[int, list[Tensor]] = {}

        def count(index: int, activity: Tensor) -> None:
            found = _active(layers[index], activity, isinstance(pattern, Filter))
            counts[index] = [a + b for a, b in zip(counts.get(index, (0, 0)), found)]

        watched = _after_relu if isinstance(pattern, Filter) else _at_input
        with task.scoring(layers), torch.no_grad():
            for batch in task.batches:
                with watched(task.model, layers, count):
                    task.model(*batch.args, **batch.kwargs)
        for index, layer in enumerate(layers):
            if index not in counts:
                what = "an nn.ReLU module after" if isinstance(pattern, Filter) else "a call of"
                raise ValueError(
                    f"prune: expected {what} layer {layer.name!r}, got none; add it to ignore"
                )
        return [counts[i][0] / counts[i][1] for i in range(len(layers))]

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Score by the share of nonzeros."""
        return total


def _active(layer: Layer, activity: Tensor, is_filter: bool) -> tuple[Tensor, Tensor]:
    """Nonzeros per unit, float64 `(units,)`, and the number of values they are counted among."""
    axis = activity.ndim + 1 - layer.weight.ndim
    found = (activity != 0).movedim(axis, 0).flatten(1)
    if not is_filter:
        # Channel i of a grouped convolution is the i-th of every group.
        found = found.unflatten(0, (layer.groups, -1)).transpose(0, 1).flatten(1)
    return found.sum(1).double(), torch.tensor(float(found.shape[1]), dtype=torch.float64)


@contextmanager
def _at_input(model: nn.Module, layers: Sequence[Layer], count: Callable) -> Iterator[None]:
    handles = [
        layer.module.register_forward_pre_hook(lambda _, inputs, i=i: count(i, inputs[0]))
        for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _after_relu(model: nn.Module, layers: Sequence[Layer], count: Callable) -> Iterator[None]:
    index = {layer.module: i for i, layer in enumerate(layers)}
    # Tensors by identity; holding them keeps the ids from being used again during the run.
    source: dict[int, tuple[int, Tensor]] = {}

    def follow(module, inputs, output):
        if module in index:
            source[id(output)] = index[module], output
        elif inputs and id(inputs[0]) in source:
            layer, _ = source[id(inputs[0])]
            if isinstance(module, RECTIFIERS):
                count(layer, output)
            elif isinstance(module, PASSING):
                source[id(output)] = layer, output

    handles = [m.register_forward_hook(follow) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
