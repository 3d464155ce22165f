"""Han's thresholds: a layer drops what is small against the spread of its own weights."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..patterns import NM, Pattern, parse
from ..ranking import weights_in
from .targets import find_layers


def deviation_scores(weight: Tensor, pattern: Pattern) -> Tensor:
    """Magnitudes in standard deviations of the layer, `|w| / std(w)`, mean over each unit.

    The deviation is that of the weights that are not 0, so that a layer pruned before is measured
    by what it has left.

    Returns:
        float64 `(units,)`.
    """
    alive = weight[weight != 0].double()
    scores = pattern.unit_scores(weight.abs().double())
    spread = alive.std(correction=0) if alive.numel() else alive.new_zeros(())
    # Weights that are all equal are infinitely far from 0 in their deviations.
    return torch.where(scores > 0, scores / spread, 0)


def threshold_scope(
    model: nn.Module,
    quality: float,
    pattern: str | Pattern = "unstructured",
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Iterable[str | type] = (),
) -> dict[str, float]:
    """Sparsities for `prune(scope=)` that drop what is smaller than `quality * std` of its layer.

    Han et al. 2015, arXiv:1506.02626, section 3: prune, retrain, and repeat with a larger quality.
    Method `magnitude` with this scope drops exactly these weights; `scope="std"` finds the quality
    that gives a wanted sparsity.

    Args:
        model: Any module.
        quality: Threshold in standard deviations, >= 0; the same for all layers.
        pattern: Units go by their mean magnitude.
        targets: As for `prune`.
        ignore: As for `prune`.

    Returns:
        Sparsity by layer name; every layer keeps at least one unit.

    Raises:
        ValueError: A bad quality, an N:M pattern, or as for `prune`.
        TypeError: As for `prune`.
    """
    number = isinstance(quality, int | float) and not isinstance(quality, bool)
    if not number or not quality >= 0:
        raise ValueError(f"threshold_scope: expected quality >= 0, got {quality!r}")
    pattern = parse(pattern)
    if isinstance(pattern, NM):
        raise ValueError(
            f"threshold_scope: expected a pattern of units, got {pattern}, which fixes the sparsity"
        )
    layers, _ = find_layers(model, targets, ignore, pattern)
    sparsities = {}
    for layer in layers:
        scores, total = deviation_scores(layer.weight, pattern), layer.weight.numel()
        sizes = pattern.unit_sizes(layer.weight.shape)
        kept = max(weights_in(scores >= quality, sizes), 1)
        sparsities[layer.name] = (total - kept) / total
    return sparsities
