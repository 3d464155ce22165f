"""Network slimming: the scale of BatchNorm says what a channel is worth."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ...patterns import Filter, Pattern
from ..targets import Layer
from ..task import Task
from .base import Method


@dataclass(frozen=True)
class Slimming(Method):
    """Score a filter by `|gamma|` of the BatchNorm that follows (Liu et al. 2017).

    arXiv:1708.06519, for networks trained with `slimming_penalty`. Scale and shift of a dropped
    filter go to zero with it, so the channel is dead altogether. The BatchNorm of a layer is the
    next one of as many features in the order of the model's modules, before another layer with
    weights.

    Attributes:
        norms: `{layer name: BatchNorm name}` where that order is not the order of the calls.
    """

    norms: Mapping[str, str] = field(default_factory=dict, hash=False)

    def misfit(self, pattern: Pattern) -> str | None:
        """BatchNorm scales filters."""
        if isinstance(pattern, Filter):
            return None
        return f"method 'slimming' needs pattern filter, got pattern {pattern}"

    def measure(self, task: Task, layers: Sequence[Layer], pattern: Pattern) -> list[Tensor]:
        """`|gamma|`, `(out,)` per layer."""
        return [self._norm(task.model, layer).weight.detach().abs() for layer in layers]

    def unit_scores(self, layer: Layer, pattern: Pattern, total: Tensor | None = None) -> Tensor:
        """Score by `|gamma|`."""
        return total

    def settle(self, model: nn.Module, layer: Layer, mask: Tensor) -> None:
        """Set scale and shift of dropped filters to zero."""
        norm, dead = self._norm(model, layer), ~mask.flatten(1).any(1)
        with torch.no_grad():
            norm.weight.masked_fill_(dead, 0)
            norm.bias.masked_fill_(dead, 0)

    def _norm(self, model: nn.Module, layer: Layer) -> _BatchNorm:
        modules = dict(model.named_modules())
        if layer.name in self.norms:
            norm = modules.get(self.norms[layer.name])
        else:
            names = list(modules)
            after = names[names.index(layer.name) + 1 :]
            norm = _next_norm(modules[name] for name in after)
        out = layer.weight.shape[0]
        if not isinstance(norm, _BatchNorm) or not norm.affine or norm.num_features != out:
            raise ValueError(
                f"prune: expected an affine BatchNorm of {out} features after layer "
                f"{layer.name!r}, got {'none' if norm is None else norm}; name it in norms or add "
                "the layer to ignore"
            )
        return norm


def slimming_penalty(model: nn.Module, strength: float = 1e-4) -> Tensor:
    """Penalty `strength * sum |gamma|` over all BatchNorms, to be added to the training loss.

    Liu et al. 2017, arXiv:1708.06519, eq. 1.

    Raises:
        ValueError: No affine BatchNorm, or a strength below 0.
    """
    if not isinstance(strength, int | float) or not strength >= 0:
        raise ValueError(f"slimming_penalty: expected strength >= 0, got {strength!r}")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]
    if not norms:
        raise ValueError("slimming_penalty: expected a model with affine BatchNorm, got none")
    return strength * sum(norm.weight.abs().sum() for norm in norms)


def _next_norm(modules: Iterable[nn.Module]) -> nn.Module | None:
    for module in modules:
        if isinstance(module, _BatchNorm):
            return module
        if isinstance(module, nn.Linear | _ConvNd):
            return None
    return None
