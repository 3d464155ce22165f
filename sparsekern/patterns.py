"""Patterns: which weights of a layer may be nonzero together.

A weight is `(out, in)` for a linear layer and `(out, in / groups, *kernel)` for a convolution.
Every pattern but N:M cuts it into *units* that are kept or dropped whole. A unit is a tile
`(rows, cols, positions)` over out, in and flattened kernel positions, so one small class serves
single weights, blocks, vectors, kernels, filters and channels. Units are numbered in row-major
order of the tile grid; tiles at the edge may be smaller. Masks are boolean, True = kept.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .pattern_base import STRAY_ZEROS, Pattern, check_sizes
from .patterns_nm import NM, TransposableNM
from .ranking import check_sparsity, keep, kept_weights
from .tiles import as_3d, extent_3d, split_tiles, tile_any, tile_lengths

ACCEPTED = (
    '"unstructured", "N:M" (N kept of M, as in "2:4"), "N:MT" (the same for the transposed '
    'weight, too), "block:RxC" (as in "block:32x32"), '
    '"vector:1xC", "vector:Rx1", "kernel", "filter", "channel"'
)


class Tiled(Pattern):
    """A pattern whose units are tiles, kept or dropped whole."""

    def tile(self, shape) -> tuple[int, int, int]:
        """Size of a full unit in (out, in, kernel position), clipped to a weight of this shape."""
        extent = extent_3d(shape)
        return tuple(min(t, e) for t, e in zip(self._tile(extent), extent, strict=True))

    def grid(self, shape) -> tuple[int, int, int]:
        """Number of units along (out, in, kernel position)."""
        extent, tile = extent_3d(shape), self.tile(shape)
        return tuple(-(-e // t) for e, t in zip(extent, tile, strict=True))

    def unit_sizes(self, shape) -> int | Tensor:
        """Weights per unit: one int if all units are equal, else int64 `(units,)`."""
        extent, tile = extent_3d(shape), self.tile(shape)
        if all(e % t == 0 for e, t in zip(extent, tile, strict=True)):
            return math.prod(tile)
        along = [tile_lengths(e, t) for e, t in zip(extent, tile, strict=True)]
        return (along[0][:, None, None] * along[1][:, None] * along[2]).flatten()

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Mean score of each unit, float `(units,)`.

        The mean, and not the sum, because a budget counts weights: the units worth keeping are
        those with the most score per weight, whatever their size.
        """
        tile = self.tile(scores.shape)
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        if math.prod(tile) == 1:
            return scores.reshape(-1)
        sums = split_tiles(as_3d(scores), tile).sum((1, 3, 5)).flatten()
        sizes = self.unit_sizes(scores.shape)
        return sums / (sizes if isinstance(sizes, int) else sizes.to(sums.device))

    def unit_maxima(self, scores: Tensor) -> Tensor:
        """Largest score of each unit, of scores that are not negative, `(units,)`."""
        return split_tiles(as_3d(scores), self.tile(scores.shape)).amax((1, 3, 5)).flatten()

    def expand(self, unit_mask: Tensor, shape) -> Tensor:
        """Blow a boolean `(units,)` up to a mask of the weight's shape."""
        (rows, cols, positions), tile = self.grid(shape), self.tile(shape)
        if math.prod(tile) == 1:
            return unit_mask.reshape(shape)
        out, inner, area = extent_3d(shape)
        tiles = unit_mask.view(rows, 1, cols, 1, positions, 1)
        tiles = tiles.expand(rows, tile[0], cols, tile[1], positions, tile[2])
        full = tiles.reshape(rows * tile[0], cols * tile[1], positions * tile[2])
        return full[:out, :inner, :area].reshape(shape)

    def _mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        check_sparsity("mask", sparsity)
        kept = kept_weights(scores.numel(), sparsity)
        chosen = keep(self.unit_scores(scores), self.unit_sizes(scores.shape), kept)
        return self.expand(chosen, scores.shape)

    def _obeys(self, nonzero: Tensor, stray: float) -> bool:
        tile = self.tile(nonzero.shape)
        if math.prod(tile) == 1:
            return True
        occupied, sizes = tile_any(nonzero, tile), self.unit_sizes(nonzero.shape)
        if isinstance(sizes, int):
            kept = sizes * int(occupied.count_nonzero())
        else:
            kept = int(sizes.to(occupied.device)[occupied].sum())
        return kept - int(nonzero.count_nonzero()) <= stray


@dataclass(frozen=True)
class Unstructured(Tiled):
    """Every weight for itself."""

    def _tile(self, extent):
        return 1, 1, 1

    def _text(self):
        return "unstructured"


@dataclass(frozen=True)
class Block(Tiled):
    """Blocks of `rows` outputs x `cols` inputs; in a convolution, at each kernel position."""

    rows: int
    cols: int

    def __post_init__(self):
        """Check the sizes."""
        check_sizes("block", self.rows, self.cols)

    def _tile(self, extent):
        return self.rows, self.cols, 1

    def _text(self):
        return f"block:{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Vector(Tiled):
    """Strips of one row (`1xC`) or one column (`Rx1`), laid out as blocks are."""

    rows: int
    cols: int

    def __post_init__(self):
        """Check the sizes."""
        check_sizes("vector", self.rows, self.cols)
        if min(self.rows, self.cols) > 1 or self.rows == self.cols:
            got = f"{self.rows}x{self.cols}"
            raise ValueError(f"vector: expected one side to be 1 and the other longer, got {got}")

    def _tile(self, extent):
        return self.rows, self.cols, 1

    def _text(self):
        return f"vector:{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Kernel(Tiled):
    """Whole kernels of a convolution: `weight[o, i]`."""

    def _misfit(self, shape):
        return None if len(shape) >= 3 else f"needs a convolution, got shape {tuple(shape)}"

    def _tile(self, extent):
        return 1, 1, extent[2]

    def _text(self):
        return "kernel"


@dataclass(frozen=True)
class Filter(Tiled):
    """Whole output channels (rows of a linear layer): `weight[o]`."""

    def _tile(self, extent):
        return 1, *extent[1:]

    def _text(self):
        return "filter"


@dataclass(frozen=True)
class Channel(Tiled):
    """Whole input channels (columns of a linear layer): `weight[:, i]`.

    In a grouped convolution index i is the i-th channel of every group.
    """

    def _tile(self, extent):
        return extent[0], 1, extent[2]

    def _text(self):
        return "channel"


NAMED = {str(p): p for p in (Unstructured(), Kernel(), Filter(), Channel())}
SIZED = {"block": Block, "vector": Vector}
# What `detect` looks for, the most useful to a kernel first. 1:2 also obeys 2:4 and is named so.
DETECTED_TILES = (
    Filter(),
    Channel(),
    Kernel(),
    *(Block(size, size) for size in (64, 32, 16, 8, 4)),
    *(Vector(*sides) for sides in ((1, 8), (1, 4), (8, 1), (4, 1))),
)
DETECTED_NM = (NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 8), NM(1, 8), NM(4, 16), NM(2, 16))


def parse(pattern: "str | Pattern") -> Pattern:
    """Read a pattern string, or pass a pattern through.

    Raises:
        ValueError: The string is none of those accepted, or its sizes are out of range.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        if pattern in NAMED:
            return NAMED[pattern]
        if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})(T?)", pattern):
            return (TransposableNM if match[3] else NM)(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"(block|vector):(\d{1,9})x(\d{1,9})", pattern):
            return SIZED[match[1]](int(match[2]), int(match[3]))
    raise ValueError(f"parse: expected a pattern, one of {ACCEPTED}; got {pattern!r}")


def detect(weight: Tensor) -> Pattern:
    """Name the most structured pattern that the zeros of a weight obey.

    Tried in the order of `DETECTED_TILES` (filter, channel, kernel, square blocks from 64 to 4,
    vectors), then `DETECTED_NM` (N nonzeros in every group, stray zeros aside); otherwise
    unstructured. The answer passes `verify`. A tile that is a single weight in this shape says
    nothing and is passed over. A dense weight is unstructured. Costs two or three passes over the
    weight.

    Args:
        weight: `(out, in, *kernel)`, any dtype.

    Raises:
        ValueError: Fewer than two dimensions.
    """
    if weight.ndim < 2:
        raise ValueError(f"detect: expected a weight of at least 2 dimensions, got {weight.ndim}")
    weight = as_3d(weight.detach())
    if weight.numel() == 0:
        return Unstructured()
    nonzero = weight != 0
    zeros = weight.numel() - int(nonzero.count_nonzero())
    # Counts, then a few bands of rows, rule out the candidates at a fraction of the full cost.
    likely = [p for p in DETECTED_TILES + DETECTED_NM if _plausible(p, weight.shape, zeros)]
    for band in _row_bands(nonzero):
        likely = [p for p in likely if p._obeys(band, STRAY_ZEROS * zeros)]
    return next((p for p in likely if p._obeys(nonzero, STRAY_ZEROS * zeros)), Unstructured())


def _plausible(pattern: Pattern, shape, zeros: int) -> bool:
    """Say whether so many zeros can come from the pattern at all."""
    if isinstance(pattern, NM):
        expected = math.prod(shape) * pattern.sparsity
        fits = pattern.misfit(shape) is None
        return fits and expected <= zeros <= expected * (1 + STRAY_ZEROS)
    sizes = pattern.unit_sizes(shape)
    smallest = sizes if isinstance(sizes, int) else int(sizes.min())
    return math.prod(pattern.tile(shape)) > 1 and zeros >= smallest


def _row_bands(nonzero: Tensor, height: int = 64) -> list[Tensor]:
    # Bands start at multiples of every candidate's height, so a whole tile never straddles one.
    last = (nonzero.shape[0] - 1) // height
    return [nonzero[i * height : (i + 1) * height] for i in sorted({0, last // 2, last})]
