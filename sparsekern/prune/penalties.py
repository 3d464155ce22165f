"""Regularisers that make weights small before they are pruned, to be added to the loss."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..patterns import NM, Pattern, parse
from .targets import Layer, find_layers


def weight_penalty(
    model: nn.Module,
    strength: float,
    p: int = 1,
    pattern: str | Pattern = "unstructured",
    targets: type | Sequence[type] = (nn.Linear, nn.Conv2d),
    ignore: str | type | Iterable[str | type] = (),
) -> Tensor:
    """L1 or L2 regularisation of the weights that are to be pruned; biases are left alone.

    With p = 1 the penalty is `strength * sum |w|` for single weights, and for a pattern of units
    the group lasso, `strength * sum of sqrt(size) * ||w_u||_2`, which drives whole units to 0 (Yuan
    & Lin 2006, eq. 2.1; for networks Wen et al. 2016, arXiv:1608.03665, eq. 1). With p = 2 it is
    `strength * sum w^2`, whatever the pattern. Han et al. 2015, arXiv:1506.02626, section 3.1: L1
    is better right after pruning, L2 once the network is retrained.

    Args:
        model: Any module.
        strength: Factor, >= 0.
        p: 1 or 2.
        pattern: Units of the group lasso.
        targets: As for `prune`.
        ignore: As for `prune`.

    Returns:
        Scalar with a gradient, 0 at weights that are 0. A shared weight counts once.

    Raises:
        ValueError: A bad strength or p, an N:M pattern with p = 1, or as for `prune`.
        TypeError: As for `prune`.
    """
    if not isinstance(strength, int | float) or not strength >= 0:
        raise ValueError(f"weight_penalty: expected strength >= 0, got {strength!r}")
    if p not in (1, 2):
        raise ValueError(f"weight_penalty: expected p 1 or 2, got {p!r}")
    pattern = parse(pattern)
    if isinstance(pattern, NM) and p == 1:
        raise ValueError(f"weight_penalty: expected a pattern of units, got {pattern}")
    layers, _ = find_layers(model, targets, ignore, pattern)
    if p == 2:
        return strength * sum(layer.module.weight.square().sum() for layer in layers)
    return strength * sum(_group_lasso(layer, pattern) for layer in layers)


def _group_lasso(layer: Layer, pattern: Pattern) -> Tensor:
    squares = pattern.unit_scores(layer.oriented(layer.module.weight).square())
    sizes = pattern.unit_sizes(layer.weight.shape)
    sizes = sizes if isinstance(sizes, int) else sizes.to(squares.device)
    # sqrt(size) * sqrt(size * mean square). The slope of a root at 0 is infinite: keep 0 out of it.
    roots = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    return (roots * sizes).sum()
