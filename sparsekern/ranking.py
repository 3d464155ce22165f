"""Exact choice of the best units under a budget counted in weights."""

import math

import torch
from torch import Tensor


def check_sparsity(where: str, sparsity) -> None:
    """Refuse anything but a number in [0, 1)."""
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        raise ValueError(f"{where}: expected sparsity in [0, 1), got {sparsity!r}")


def kept_weights(numel: int, sparsity: float) -> int:
    """Weights that stay: `numel - floor(sparsity * numel + 0.5)`."""
    return numel - math.floor(sparsity * numel + 0.5)


def weights_in(units: Tensor, sizes: "int | Tensor") -> int:
    """Count the weights in chosen units, boolean `(units,)`; sizes as for `keep`."""
    if isinstance(sizes, int):
        return sizes * int(units.count_nonzero())
    return int(sizes.to(units.device)[units].sum())


def keep(scores: Tensor, sizes: "int | Tensor", kept: float, at_least: int = 1) -> Tensor:
    """Keep the best units until their total size is nearest to a budget.

    Args:
        scores: Float `(units,)` without NaN.
        sizes: Weights per unit, one int for all or int64 `(units,)`.
        kept: Budget in weights.
        at_least: Fewest units to keep, whatever the budget.

    Returns:
        Boolean `(units,)`. Units go in descending order of score, the lower index first among
        equals; of two equally near totals the larger is taken.
    """
    if isinstance(sizes, int):
        return _keep_top(scores, max(at_least, math.floor(kept / sizes + 0.5)))
    order = scores.argsort(descending=True, stable=True)
    totals = sizes.to(scores.device)[order].cumsum(0)
    count = int(torch.searchsorted(totals, kept))
    below = int(totals[count - 1]) if count else 0
    if count < totals.numel() and int(totals[count]) - kept <= kept - below:
        count += 1
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[: max(at_least, count)]] = True
    return mask


def _keep_top(scores: Tensor, count: int) -> Tensor:
    """Keep the `count` largest, exactly, by selection (linear in time) rather than sorting."""
    units = scores.numel()
    if count <= 0 or count >= units:
        return torch.full((units,), count > 0, dtype=torch.bool, device=scores.device)
    threshold = scores.kthvalue(units - count + 1).values
    mask = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.count_nonzero())]] = True
    return mask
