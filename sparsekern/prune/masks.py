"""Looking at masks and weights: statistics, dead layers, how much two prunings agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..patterns import Unstructured, detect
from .left import all_reasons, find_left
from .plots import new_figure
from .report import AS_THEY_ARE, PruneReport, make_report
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

    def plot(self, path: str | Path) -> None:
        """Draw a bar per layer and a line for all together into an image file."""
        figure, axes = new_figure(xlabel="layer", ylabel="kept in both / kept in either")
        axes.bar([name or "(model)" for name in self.layers], list(self.layers.values()))
        axes.axhline(self.total, color="grey", linestyle="--", label=f"all: {self.total:.3g}")
        axes.set_ylim(0, 1)
        axes.tick_params("x", rotation=90 if len(self.layers) > 8 else 0)
        axes.legend(fontsize="small")
        figure.savefig(path)


@dataclass(frozen=True)
class WeightHistogram:
    """How the weights that are not 0 are distributed; by layer name.

    Attributes:
        edges: Edges of the bins, one more than there are counts.
        counts: Nonzero weights per bin.
        zeros: Weights that are exactly 0.
    """

    edges: dict[str, list[float]]
    counts: dict[str, list[int]]
    zeros: dict[str, int]

    def plot(self, path: str | Path) -> None:
        """Draw a line per layer, counts on a logarithmic scale, into an image file."""
        figure, axes = new_figure(xlabel="weight", ylabel="weights that are not 0")
        for name, counts in self.counts.items():
            share = self.zeros[name] / max(1, self.zeros[name] + sum(counts))
            label = f"{name or '(model)'}, {share:.0%} zeros"
            axes.stairs(counts, self.edges[name], label=label)
        axes.set_yscale("symlog", linthresh=1)
        axes.legend(fontsize="small")
        figure.savefig(path)


def weight_histogram(
    model: nn.Module,
    bins: int = 50,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Sequence[str | type] = (),
) -> WeightHistogram:
    """Count the weights of each layer in equal bins from its smallest to its largest.

    Raises:
        ValueError: Bins below 1, or no layer to look at.
        TypeError: An argument of the wrong type.
    """
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"weight_histogram: expected bins to be an int >= 1, got {bins!r}")
    layers, _ = find_layers(model, targets, ignore, Unstructured(), sparse=True)
    result = WeightHistogram({}, {}, {})
    for layer in layers:
        weight = layer.weight.double().cpu().flatten()
        kept = weight[weight != 0]
        counts, edges = np.histogram(kept.numpy(), bins)
        result.counts[layer.name], result.edges[layer.name] = counts.tolist(), edges.tolist()
        result.zeros[layer.name] = weight.numel() - kept.numel()
    return result


def sparsity_report(
    model: nn.Module,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Sequence[str | type] = (),
) -> PruneReport:
    """Count the zeros of a model as it is, whoever made them, and name the pattern of each layer.

    Raises:
        ValueError: No layer to look at.
        TypeError: An argument of the wrong type.
    """
    layers, skipped = find_layers(model, targets, ignore, Unstructured(), sparse=True)
    rows = [
        row
        for layer in layers
        for row in make_report("", detect(layer.weight), "", [layer], {}, layer.module).layers
    ]
    left = find_left(model, layers, skipped)
    reasons = all_reasons(skipped, left)
    return PruneReport(AS_THEY_ARE, "detected", "per layer", tuple(rows), reasons, left)


def layer_collapse(
    model: nn.Module,
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Sequence[str | type] = (),
    threshold: float = 0.0,
) -> list[str]:
    """Name the layers of which at most a share `threshold` of the weights is not zero.

    By default those whose weights are all zero: nothing gets through, the network is dead there
    (layer collapse, Tanaka et al. 2020, arXiv:2006.05467).

    Raises:
        ValueError: No layer to look at, or a threshold outside of [0, 1].
        TypeError: An argument of the wrong type.
    """
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= 1:
        raise ValueError(f"layer_collapse: expected threshold in [0, 1], got {threshold!r}")
    layers, _ = find_layers(model, targets, ignore, Unstructured(), sparse=True)
    return [layer.name for layer in layers if _kept_share(layer.weight) <= threshold]


def _kept_share(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / weight.numel()


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
        layers, _ = find_layers(source, (nn.Linear, nn.Conv2d), (), Unstructured(), sparse=True)
        return {layer.name: layer.weight != 0 for layer in layers}
    return {name: mask != 0 for name, mask in source.items()}
