"""Scores: how much a weight matters. One function per formula, free of patterns and budgets."""

import torch
from torch import Tensor


def magnitude(weight: Tensor, p: float = 1.0) -> Tensor:
    """`|w|^p`, float of the weight's shape (Han et al. 2015, arXiv:1506.02626)."""
    return weight.abs() if p == 1 else weight.abs().float() ** p


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """`|w_ij| * ||x_j||_2`, of the weight's shape (Sun et al. 2023, arXiv:2306.11695, eq. 1).

    Args:
        weight: `(out, in / groups, *kernel)`.
        norms: `(groups, fan_in)`, L2 norms of the inputs, fan_in = in / groups * kernel positions.
    """
    groups, fan_in = norms.shape
    scaled = weight.reshape(groups, -1, fan_in).abs().to(norms.dtype) * norms[:, None]
    return scaled.reshape(weight.shape)


def surgeon(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """`w_j^2 / [H^-1]_jj`, the loss a weight's removal costs after the best update of the others.

    Optimal Brain Surgeon (Hassibi & Stork 1993), without its factor 1/2.

    Args:
        weight: `(groups, out / groups, fan_in)`.
        inverse_diagonal: `(groups, fan_in)`, the diagonal of the inverse Hessian.
    """
    return weight**2 / inverse_diagonal[:, None]


def rank_in_rows(scores: Tensor, rows: int, sizes: "int | Tensor") -> Tensor:
    """Make units comparable across rows: minus the share of their row that is held by better ones.

    Ranking the result over the layer prunes the same share of every row, still exact to one unit in
    total. With one unit per row nothing can be compared within rows, and the scores come back.

    Args:
        scores: Float `(units,)`, row-major over a grid of `rows` rows.
        rows: Rows of the unit grid.
        sizes: Weights per unit, as `Tiled.unit_sizes` gives them.

    Returns:
        Float `(units,)` in (-1, 0].
    """
    table = scores.view(rows, -1)
    if table.shape[1] == 1:
        return scores
    order = table.argsort(dim=1, descending=True, stable=True)
    if isinstance(sizes, int):
        steps = torch.arange(table.shape[1], device=scores.device, dtype=torch.float64)
        share = (steps / table.shape[1]).expand(rows, -1)
    else:
        ordered = sizes.to(scores.device).view(rows, -1).gather(1, order).double()
        totals = ordered.cumsum(1)
        share = (totals - ordered) / totals[:, -1:]
    ranks = torch.empty(table.shape, dtype=torch.float64, device=scores.device)
    return -ranks.scatter_(1, order, share).view(-1)
