"""SparseGPT: prune column by column and let the weights to the right make up for each loss."""

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...patterns import NM, Channel, Filter, Kernel, Pattern, Unstructured, Vector
from ...ranking import keep, weights_in
from .. import scores
from ..targets import Layer
from .base import Method


def gram(layer: Layer, rows: Tensor) -> Tensor:
    """`X^T X` of input rows `(groups, T, fan_in)`, float64 `(groups, fan_in, fan_in)`."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows.mT @ rows).double()


@dataclass(frozen=True)
class SparseGPT(Method):
    """Pruning with weight updates (Frantar & Alistarh 2023, arXiv:2301.00774).

    Minimises the output error `||(W - W') X||^2` of each layer with Hessian `H = X X^T`, swept in
    column blocks: in each, the weights with the smallest `w_j^2 / [H^-1]_jj` go (H over the columns
    not yet swept), and the rest of the row is updated. What was 0 before goes first and stays 0. A
    unit of several columns (which the paper does not have) is scored by the loss of all of them
    together. Inputs that are never active are pruned first. Memory: one float64 `(fan_in, fan_in)`
    Hessian per layer of a stage.

    Attributes:
        percdamp: Share of the mean diagonal that is added to the diagonal of H, >= 0; raised with a
            warning where that is too little, unless it is 0.
        blocksize: Columns per block, >= 1; rounded up to a multiple of the pattern's width.
        sequential: As for Wanda: stage by stage on pruned inputs, or all on dense inputs at once.
    """

    percdamp: float = 0.01
    blocksize: int = 128
    sequential: bool = True
    scope: ClassVar[str] = "uniform"
    needs: ClassVar[str] = "data"
    statistic: ClassVar = staticmethod(gram)

    def __post_init__(self):
        """Check the options."""
        if not isinstance(self.percdamp, int | float) or not 0 <= self.percdamp < math.inf:
            raise ValueError(f"prune: expected percdamp >= 0, got {self.percdamp!r}")
        if not isinstance(self.blocksize, int) or self.blocksize < 1:
            raise ValueError(f"prune: expected blocksize of at least 1, got {self.blocksize!r}")

    def misfit(self, pattern: Pattern) -> str | None:
        """Refuse units that span all outputs or inputs: nothing is left to update."""
        if isinstance(pattern, Filter | Channel):
            return f"method 'sparsegpt' needs units within rows, got pattern {pattern}"
        return None

    def score(self, layer: Layer, total: Tensor | None) -> Tensor:
        """Score as if each weight were pruned alone: `w_j^2 / [H^-1]_jj` with the full H."""
        inverse, _ = _factored(layer, total, self.percdamp)
        grouped = layer.weight.reshape(layer.groups, -1, total.shape[-1])
        grouped = grouped.to(_work_dtype(layer.weight))
        diagonal = inverse.diagonal(dim1=1, dim2=2).to(grouped.dtype)
        alive = total.diagonal(dim1=1, dim2=2)[:, None] > 0
        return (scores.surgeon(grouped, diagonal) * alive).reshape(layer.weight.shape)

    def prune_layer(
        self, layer: Layer, pattern: Pattern, kept: float, total: Tensor | None, by_row: bool
    ) -> Tensor:
        """Prune and update one layer in place; returns the mask."""
        weight, order = layer.weight, _column_order(layer.weight, pattern)
        hessian = total[:, order][:, :, order]
        dead = hessian.diagonal(dim1=1, dim2=2) <= 0
        _, factor = _factored(layer, hessian, self.percdamp)
        alive = torch.ones_like(weight, dtype=torch.bool) if layer.alive is None else layer.alive
        grouped = layer.groups, -1, total.shape[-1]
        columns, alive = (t.reshape(grouped)[:, :, order] for t in (weight, alive))
        columns = columns.to(_work_dtype(weight))
        sweep = _Sweep(columns, alive, factor, dead, _flat(pattern, weight))
        mask = sweep.run(kept, self.blocksize, _runs(weight, pattern))
        back = order.argsort()
        weight.copy_(sweep.columns[:, :, back].reshape(weight.shape))
        return mask[:, :, back].reshape(weight.shape)


class _Sweep:
    """Algorithm 1 of the paper over `(groups, out / groups, fan_in)`, all groups at once."""

    def __init__(
        self, columns: Tensor, alive: Tensor, factor: Tensor, dead: Tensor, pattern: Pattern
    ):
        self.columns, self.alive, self.dead, self.pattern = columns, alive, dead, pattern
        self.factor = factor.to(columns.dtype)
        self.mask = torch.ones_like(columns, dtype=torch.bool)
        self.seen = self.kept = 0

    def run(self, kept: float, blocksize: int, runs: list[range]) -> Tensor:
        """Sweep runs of columns in blocks. `kept`: weights to keep in all."""
        if not isinstance(self.pattern, NM):
            # Of what was not 0 before, so that old zeros in some columns starve no others.
            there = sum(self._occupied(run.start, run.stop)[1] for run in runs)
            self.density = kept / max(1, there)
        width = getattr(self.pattern, "m", None) or getattr(self.pattern, "cols", 1)
        step = -(-blocksize // width) * width
        for run in runs:
            for start in range(run.start, run.stop, step):
                stop = min(start + step, run.stop)
                errors = self._block(start, stop)
                # Lazy batch update: columns beyond the block get its corrections in one product.
                self.columns[:, :, stop:] -= errors @ self.factor[:, start:stop, stop:]
        return self.mask

    def _block(self, start: int, stop: int) -> Tensor:
        block, factor = self.columns[:, :, start:stop], self.factor[:, start:stop, start:stop]
        errors = torch.zeros_like(block)
        width = self.pattern.m if isinstance(self.pattern, NM) else stop - start
        for j in range(stop - start):
            if j % width == 0:
                self._select(start + j, start + j + width)
            dropped = ~self.mask[:, :, start + j]
            pivot = factor[:, j, j, None]
            errors[:, :, j] = block[:, :, j].where(dropped, 0) / pivot
            block[:, :, j:] -= errors[:, :, j, None] * factor[:, None, j, j:]
            block[:, :, j].masked_fill_(dropped, 0)
        return errors

    def _losses(self, start: int, stop: int) -> Tensor:
        """Share of each weight in the loss of its unit, `w_u^T ([H^-1]_uu)^-1 w_u` per row.

        The columns of a unit go together, so their inputs cannot make up for each other. With
        `H^-1 = U^T U` the loss is `||w_u U_uu^-1||^2`; for one column it is `w_j^2 / [H^-1]_jj`.
        """
        width = getattr(self.pattern, "cols", 1)
        if width == 1:
            diagonal = self.factor.diagonal(dim1=1, dim2=2)[:, start:stop]
            return scores.surgeon(self.columns[:, :, start:stop], diagonal**2)
        errors = torch.empty_like(self.columns[:, :, start:stop])
        for low in range(start, stop, width):
            high = min(low + width, stop)
            block = self.factor[:, low:high, low:high]
            errors[:, :, low - start : high - start] = torch.linalg.solve_triangular(
                block, self.columns[:, :, low:high], upper=True, left=False
            )
        return errors**2

    def _occupied(self, start: int, stop: int) -> tuple[Tensor, int]:
        """Units with anything alive, boolean `(units,)`, and the number of their weights."""
        alive = self.alive[:, :, start:stop].flatten(0, 1)
        units = self.pattern.unit_scores(alive.float()) > 0
        return units, weights_in(units, self.pattern.unit_sizes(alive.shape))

    def _select(self, start: int, stop: int) -> None:
        alive = self.alive[:, :, start:stop].flatten(0, 1)
        losses = self._losses(start, stop).masked_fill(self.dead[:, None, start:stop], 0)
        losses = losses.flatten(0, 1)
        if isinstance(self.pattern, NM):
            chosen = self.pattern.mask(losses.masked_fill(~alive, -torch.inf))
        else:
            # Budgets run on from block to block, so that rounding does not add up.
            occupied, count = self._occupied(start, stop)
            self.seen += count
            budget = self.density * self.seen - self.kept
            sizes = self.pattern.unit_sizes(losses.shape)
            ranks = self.pattern.unit_scores(losses.where(alive, 0))
            ranks = ranks.masked_fill(~occupied, -torch.inf)
            units = keep(ranks, sizes, budget, at_least=0) & occupied
            chosen = self.pattern.expand(units, losses.shape)
            self.kept += weights_in(units, sizes)
        self.mask[:, :, start:stop] = (chosen & alive).view_as(self.mask[:, :, start:stop])


def _work_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _factored(layer: Layer, hessian: Tensor, percdamp: float) -> tuple[Tensor, Tensor]:
    """Inverse of the damped Hessian `(groups, fan_in, fan_in)` and its upper factor, float64.

    Where the Hessian is too close to singular, warns and damps ten times more, up to its mean
    diagonal; with `percdamp` 0 it raises at once.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    while True:
        # An input that is never active has a zero row: 1 on the diagonal keeps it out of others.
        extra = torch.where(diagonal <= 0, 1.0, 0.0) + percdamp * diagonal.mean(1, keepdim=True)
        try:
            factor = _cholesky(layer, hessian + torch.diag_embed(extra), percdamp)
            inverse = torch.cholesky_inverse(factor)
            return inverse, _cholesky(layer, inverse, percdamp).mT
        except ValueError as error:
            if not 0 < percdamp * 10 <= 1:
                raise
            warnings.warn(f"{error}; trying percdamp={percdamp * 10:g}", stacklevel=2)
            percdamp *= 10


def _cholesky(layer: Layer, matrix: Tensor, percdamp: float) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=1, dim2=2) ** 2
    # The sums that make up H are only this exact, so that smaller pivots are noise.
    noise = torch.finfo(_work_dtype(layer.weight)).eps * matrix.diagonal(dim1=1, dim2=2)
    if bool(failed.any()) or not bool((pivots > noise).all()):
        raise ValueError(
            f"prune: expected a positive definite Hessian in layer {layer.name!r}, got a Cholesky "
            f"failure with percdamp={percdamp:g}; use more data or a larger percdamp"
        )
    return factor


def _position_major(weight: Tensor, pattern: Pattern) -> bool:
    # Tiles and groups over input channels are contiguous only if the kernel position comes first.
    return weight.ndim > 2 and not isinstance(pattern, Unstructured | Kernel)


def _column_order(weight: Tensor, pattern: Pattern) -> Tensor:
    """Flattened columns of the weight in sweep order."""
    columns = torch.arange(weight[0].numel(), device=weight.device)
    if _position_major(weight, pattern):
        return columns.view(weight.shape[1], -1).t().flatten()
    return columns


def _runs(weight: Tensor, pattern: Pattern) -> list[range]:
    """Ranges of columns that no unit straddles, in sweep order."""
    fan_in, inner = weight[0].numel(), weight.shape[1]
    length = inner if _position_major(weight, pattern) else fan_in
    return [range(start, start + length) for start in range(0, fan_in, length)]


def _flat(pattern: Pattern, weight: Tensor) -> Pattern:
    """The pattern as it looks on the flattened columns."""
    if not isinstance(pattern, Kernel):
        return pattern
    positions = weight[0, 0].numel()
    return Vector(1, positions) if positions > 1 else Unstructured()
