"""Looking at masks: layers that died, and how much two prunings agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..patterns import Unstructured
from .targets import find_layers


@dataclass(frozen=True)
class MaskOverlap:
    """Kept in both over kept in either, from 0 to 1; two empty masks agree fully.

    Attributes:
        layers: By layer name.
        total: Over all layers together.
    """

    layers: dict[str, float]
    total: float


def layer_collapse(
    model: nn.Module,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Sequence[str | type] = (),
) -> list[str]:
    """Name the layers whose weights are all zero: nothing gets through, the network is dead there.

    Raises:
        ValueError: No layer to look at.
        TypeError: An argument of the wrong type.
    """
    layers, _ = find_layers(model, targets, ignore, Unstructured())
    return [layer.name for layer in layers if not bool(layer.weight.any())]


def mask_overlap(
    a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]
) -> MaskOverlap:
    """Compare two masks, or the zeros of two models.

    Args:
        a: A model, or masks by layer name (as `Pruner.masks`); nonzero = kept.
        b: Like `a`, with the same layers.

    Raises:
        ValueError: Other layers or other shapes.
    """
    first, second = _masks_of(a), _masks_of(b)
    if list(first) != list(second):
        got = f"{list(first)} and {list(second)}"
        raise ValueError(f"mask_overlap: expected the same layers, got {got}")
    layers, both_total, either_total = {}, 0, 0
    for name, mask in first.items():
        other = second[name].to(mask.device)
        if mask.shape != other.shape:
            got = f"{tuple(mask.shape)} and {tuple(other.shape)}"
            raise ValueError(f"mask_overlap: expected one shape in layer {name!r}, got {got}")
        both = int((mask & other).count_nonzero())
        either = int((mask | other).count_nonzero())
        layers[name] = both / either if either else 1.0
        both_total, either_total = both_total + both, either_total + either
    return MaskOverlap(layers, both_total / either_total if either_total else 1.0)


def _masks_of(source) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        layers, _ = find_layers(source, (nn.Linear, nn.Conv2d), (), Unstructured())
        return {layer.name: layer.weight != 0 for layer in layers}
    return {name: mask != 0 for name, mask in source.items()}
