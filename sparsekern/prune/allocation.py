"""Allocation: how a budget of kept weights is spread over layers.

`uniform`, `erk`, `lamp`, `std` and a dict give every layer its own budget before any score is
known; `global` ranks the units of all layers together.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..patterns import NM, Pattern
from ..ranking import check_sparsity, keep, kept_weights, weights_in
from .targets import Layer, name_matches
from .threshold import deviation_scores

SCOPES = ("global", "uniform", "erk", "lamp", "std")


class Budget:
    """Kept weights per layer, in the order of the layers.

    Units do not fit a budget exactly. With `carry` what one layer is over or under is settled by
    the next ones, so that the total stays exact to one unit.
    """

    def __init__(self, kept: Sequence[float], carry: bool = False):
        """Take the budgets; `carry` settles rounding errors between layers."""
        self.kept, self.carry, self.owed = kept, carry, 0.0

    def of(self, index: int) -> float:
        """Weights layer `index` may keep now."""
        return self.kept[index] + (self.owed if self.carry else 0.0)

    def settle(self, index: int, kept: int) -> None:
        """Record how many weights layer `index` did keep."""
        self.owed += self.kept[index] - kept


def check_scope(scope, layers: Sequence[Layer], pattern: Pattern) -> None:
    """Refuse an unknown scope, and a dict that names no layer, two contradictions or bad values."""
    if isinstance(scope, Mapping):
        _check_mapping(scope, layers, pattern)
    elif scope not in SCOPES:
        known = ", ".join(SCOPES)
        raise ValueError(f"prune: expected scope one of {known}, or a dict; got {scope!r}")


def allocate(scope, layers: Sequence[Layer], pattern: Pattern, sparsity: float | None) -> Budget:
    """Budget of every layer under `uniform`, `erk`, `lamp`, `std` or a dict.

    Args:
        scope: `"uniform"`, `"erk"`, `"lamp"`, `"std"` or `{name or glob: sparsity}`; a name beats a
            glob, an earlier glob a later one.
        layers: The layers, in order.
        pattern: Gives the smallest unit, which `erk` leaves in every layer.
        sparsity: For a dict, that of layers it does not name (None: they stay dense).
    """
    totals = [layer.weight.numel() for layer in layers]
    if isinstance(scope, Mapping):
        wanted = [_lookup(scope, layer.name, sparsity) for layer in layers]
        return Budget([kept_weights(n, s) for n, s in zip(totals, wanted, strict=True)])
    if scope == "uniform" or isinstance(pattern, NM):
        return Budget([kept_weights(n, sparsity) for n in totals])
    if scope in ("lamp", "std"):
        score = lamp_scores if scope == "lamp" else deviation_scores
        return _ranked_budget(layers, pattern, kept_weights(sum(totals), sparsity), score)
    shapes = [layer.weight.shape for layer in layers]
    floors = [math.prod(pattern.tile(shape)) for shape in shapes]
    return Budget(erdos_renyi_kernel(shapes, floors, kept_weights(sum(totals), sparsity)), True)


def erdos_renyi_kernel(shapes, floors: Sequence[int], kept: int) -> list[float]:
    """Kept weights per layer in proportion to the sum of its dimensions.

    The density of a layer is `eps * sum(shape) / prod(shape)` and at most 1, with eps such that
    the total is `kept` (RigL, Evci et al. 2020, arXiv:1911.11134, appendix A).

    Args:
        shapes: Weight shapes, `(out, in, *kernel)`.
        floors: Fewest weights each layer keeps.
        kept: Weights to keep in all.
    """
    sums, tops = [sum(shape) for shape in shapes], [math.prod(shape) for shape in shapes]

    def spread(eps: float) -> list[float]:
        layers = zip(sums, floors, tops, strict=True)
        return [min(max(eps * total, low), high) for total, low, high in layers]

    # The total is piecewise linear in eps: find the piece that holds `kept`, then interpolate.
    bounds = [*zip(floors, sums, strict=True), *zip(tops, sums, strict=True)]
    knots = sorted({bound / total for bound, total in bounds})
    after = next((i for i, eps in enumerate(knots) if sum(spread(eps)) >= kept), len(knots) - 1)
    if after == 0:
        return spread(knots[0])
    below, above = knots[after - 1], knots[after]
    low, high = sum(spread(below)), sum(spread(above))
    return spread(below + (above - below) * (kept - low) / (high - low))


def lamp_scores(weight: Tensor, pattern: Pattern) -> Tensor:
    """Layer-adaptive magnitudes, `w_u^2 / sum of w_v^2 over all w_v^2 >= w_u^2` (Lee et al. 2021).

    arXiv:2010.07611, eq. 3. A unit of several weights has the sum of their squares for `w_u^2`.

    Returns:
        float64 `(units,)`.
    """
    squares = pattern.unit_scores(weight.double() ** 2)
    sizes = pattern.unit_sizes(weight.shape)
    squares = squares * (sizes if isinstance(sizes, int) else sizes.to(squares.device))
    order = squares.argsort(descending=True, stable=True)
    totals = squares[order].cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(squares).scatter_(0, order, squares[order] / totals)


def _ranked_budget(layers: Sequence[Layer], pattern: Pattern, kept: int, score) -> Budget:
    """What each layer would keep if `score(weight, pattern)` ranked all units together."""
    scores = [score(layer.weight, pattern).cpu() for layer in layers]
    sizes = [pattern.unit_sizes(layer.weight.shape) for layer in layers]
    units = rank_globally(scores, sizes, kept)
    return Budget([weights_in(u, size) for u, size in zip(units, sizes)], True)


def rank_globally(
    scores: Sequence[Tensor], sizes: Sequence["int | Tensor"], kept: int
) -> list[Tensor]:
    """Keep the best units of all layers together, and the best unit of each layer in any case.

    Args:
        scores: Float `(units,)` per layer, on one device.
        sizes: Weights per unit and layer.
        kept: Weights to keep in all.

    Returns:
        Boolean `(units,)` per layer.
    """
    counts = [s.numel() for s in scores]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    safe = torch.tensor([f + int(s.argmax()) for f, s in zip(firsts, scores, strict=True)])
    flat, flat_sizes = torch.cat(list(scores)), _join(sizes, counts)
    rest = torch.ones(flat.numel(), dtype=torch.bool)
    rest[safe] = False
    if isinstance(flat_sizes, int):
        rest_sizes, spent = flat_sizes, flat_sizes * len(safe)
    else:
        rest_sizes, spent = flat_sizes[rest], int(flat_sizes[safe].sum())
    mask = ~rest
    mask[rest] = keep(flat[rest], rest_sizes, max(kept - spent, 0), at_least=0)
    return list(mask.split(counts))


def _join(sizes, counts) -> "int | Tensor":
    if all(isinstance(s, int) and s == sizes[0] for s in sizes):
        return sizes[0]
    pairs = zip(sizes, counts, strict=True)
    return torch.cat([torch.full((n,), s) if isinstance(s, int) else s for s, n in pairs])


def _check_mapping(scope: Mapping, layers: Sequence[Layer], pattern: Pattern) -> None:
    names = [layer.name for layer in layers]
    for entry, sparsity in scope.items():
        if not isinstance(entry, str) or not any(name_matches(entry, name) for name in names):
            raise ValueError(f"prune: expected scope to name layers ({names}), got {entry!r}")
        check_sparsity(f"prune: scope[{entry!r}]", sparsity)
        if isinstance(pattern, NM):
            pattern.check_agrees(f"prune: scope[{entry!r}]", sparsity)


def _lookup(scope: Mapping, name: str, default: float | None) -> float:
    if name in scope:
        return scope[name]
    hit = next((entry for entry in scope if name_matches(entry, name)), None)
    return scope[hit] if hit is not None else (default or 0.0)
