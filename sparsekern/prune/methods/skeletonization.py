"""Skeletonization: the relevance of units."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import Channel, Filter, Pattern
from ..targets import Layer
from ..task import Task, as_tensor
from .base import Method


@dataclass(frozen=True)
class Skeletonization(Method):
    """Score units by `-dE/da` of a gate `a = 1` on their activity (Mozer & Smolensky 1988).

    E is the sum of absolute errors `|t - o|` and not of squared ones, whose derivative vanishes
    where the network is right; a `loss_fn` replaces it, as classes need. The relevance is a running
    mean over the batches, `r <- decay r + (1 - decay) (-dE/da)`, and signed: a unit whose removal
    helps goes first.

    Pattern `channel` gates what enters a layer, the paper's activities of units; `filter` gates
    what leaves it before its activation, which for ReLU comes to the same.

    Attributes:
        decay: Of the running mean, in [0, 1); 0.8 as published.
    """

    decay: float = 0.8
    needs: ClassVar[str] = "data"

    def __post_init__(self):
        """Check the option."""
        if not isinstance(self.decay, int | float) or not 0 <= self.decay < 1:
            raise ValueError(f"prune: expected decay in [0, 1), got {self.decay!r}")

    def misfit(self, pattern: Pattern) -> str | None:
        """Units are filters or channels."""
        return only_units("skeletonization", pattern)

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor]:
        """Relevance of every unit, `(units,)` per layer."""
        axis = 0 if isinstance(pattern, Filter) else 1
        gates = [la.weight.new_ones(la.weight.shape[axis], requires_grad=True) for la in layers]
        relevance = [torch.zeros_like(gate) for gate in gates]
        with task.scoring(layers), _gated(layers, gates, axis):
            for output, target in task.outputs():
                error = task.loss if task.loss_fn is not None else absolute_error
                found = torch.autograd.grad(error(output, target), gates, allow_unused=True)
                for layer, total, slope in zip(layers, relevance, found):
                    task.count_reach(layer, slope is not None)
                    if slope is not None:
                        total.mul_(self.decay).sub_(slope, alpha=1 - self.decay)
        return relevance

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Score by relevance."""
        return total


def only_units(method: str, pattern: Pattern) -> str | None:
    """Say why a pattern is none of `filter` and `channel`; None if it is."""
    if isinstance(pattern, Filter | Channel):
        return None
    return f"method {method!r} needs pattern filter or channel, got pattern {pattern}"


def absolute_error(output, target) -> Tensor:
    """Sum of `|t - o|` per sample (dimension 0), averaged over the samples."""
    output = as_tensor(output, "unless there is a loss_fn")
    if not isinstance(target, Tensor) or target.shape != output.shape:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"prune: expected targets like the outputs, {tuple(output.shape)}, or a loss_fn; "
            f"got {got}"
        )
    return (output - target).abs().sum() / len(output)


@contextmanager
def _gated(layers: Sequence[Layer], gates: Sequence[Tensor], axis: int) -> Iterator[None]:
    handles = []
    for layer, gate in zip(layers, gates):
        if axis == 0:
            handles.append(layer.module.register_forward_hook(_gate_output(layer, gate)))
        else:
            handles.append(layer.module.register_forward_pre_hook(_gate_input(layer, gate)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gate_output(layer: Layer, gate: Tensor) -> Callable:
    return lambda module, inputs, output: output * _spread(gate, layer)


def _gate_input(layer: Layer, gate: Tensor) -> Callable:
    # Channel i of a grouped convolution is the i-th of every group.
    groups = layer.groups
    return lambda module, inputs: (inputs[0] * _spread(gate.repeat(groups), layer), *inputs[1:])


def _spread(gate: Tensor, layer: Layer) -> Tensor:
    # Channels are followed by as many dimensions as the kernel has, batched or not.
    return gate.reshape(-1, *[1] * (layer.weight.ndim - 2))
