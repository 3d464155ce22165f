"""SynFlow: keep paths from input to output, without any data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from ...patterns import Pattern
from ..data import Batch
from ..targets import Layer
from ..task import Task
from .base import Method
from .gradients import check_count


@dataclass(frozen=True)
class SynFlow(Method):
    """Score `|w| dR/d|w|`, with R the sum of outputs for an input of ones and all weights positive.

    Tanaka et al. 2020, arXiv:2006.05467, eq. 5 and algorithm 1: pruned in many rounds with
    densities that fall geometrically, which is what avoids layer collapse. Biases and buffers are
    taken positive, too, as the authors' code does; modules run in eval mode. Computed in float64,
    because the flow through a deep network leaves the range of float32.

    Of the data only the shape of the first input counts; inputs must be floating point. A layer
    that this input does not reach (an expert) is scored by magnitude, with the mean of the others.

    Attributes:
        iterations: Rounds, >= 1; 100 as published.
    """

    iterations: int = 100
    needs: ClassVar[str] = "data"

    def __post_init__(self):
        """Check the option."""
        check_count("iterations", self.iterations)

    @property
    def rounds(self) -> int:
        """As many as `iterations`."""
        return self.iterations

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor]:
        """Synaptic flow through every weight."""
        batch, model = task.batches[0], task.model
        with task.scoring(layers):
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            positive = {name: _positive(t) for name, t in tensors.items()}
            output = functional_call(model, positive, *_ones(batch))
            names = [_name_of(tensors, layer) for layer in layers]
            weights = [positive[name] for name in names]
            gradients = torch.autograd.grad(output.sum(), weights, allow_unused=True)
        flows = [_flow(*each) for each in zip(layers, weights, gradients)]
        found = [flow for flow in flows if flow is not None]
        if not found:
            raise ValueError("prune: expected a flow through a layer, got none through any")
        mean = sum(float(f.sum()) for f in found) / sum(f.numel() for f in found)
        for i, layer in enumerate(layers):
            if flows[i] is None:
                task.notes[layer.name] = "no flow reaches it; scored by magnitude"
                sizes = layer.weight.abs().double()
                flows[i] = sizes * (mean / sizes.mean().clamp(min=torch.finfo(sizes.dtype).tiny))
        return flows

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score by the flow through each weight."""
        return total


def _flow(layer: Layer, weight: Tensor, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(
            f"prune: expected a finite flow through layer {layer.name!r}, got Inf or NaN"
        )
    return layer.oriented(gradient * weight.detach())


def _positive(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    positive = tensor.detach().abs().double()
    return positive.requires_grad_(tensor.requires_grad)


def _name_of(tensors: dict[str, Tensor], layer: Layer) -> str:
    return next(name for name, tensor in tensors.items() if tensor is layer.module.weight)


def _ones(batch: Batch) -> tuple[tuple, dict]:
    def one(value):
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            raise ValueError(
                f"prune: expected floating-point inputs for method 'synflow', got {value.dtype}"
            )
        return torch.ones_like(value[:1], dtype=torch.float64)

    args = tuple(one(value) for value in batch.args)
    return args, {name: one(value) for name, value in batch.kwargs.items()}
