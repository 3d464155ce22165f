"""What every pattern can do; see `patterns` for the patterns themselves."""

import torch
from torch import Tensor

from .tiles import as_3d


def check_sizes(name: str, rows, cols) -> None:
    """Refuse anything but two ints of at least 1."""
    if not (is_int(rows) and is_int(cols) and rows >= 1 and cols >= 1):
        raise ValueError(f"{name}: expected sizes of at least 1, got {rows}x{cols}")


def is_int(value) -> bool:
    """True for ints, not for bools."""
    return isinstance(value, int) and not isinstance(value, bool)


# Trained weights hold a few exact zeros by accident; they must not hide a pattern.
STRAY_ZEROS = 1e-3


class Pattern:
    """Base of all patterns: frozen, hashable, `str(pattern)` gives the string `parse` accepts."""

    def misfit(self, shape) -> str | None:
        """Say why a weight of this shape cannot take the pattern; None if it can."""
        if len(shape) < 2:
            return f"needs at least 2 dimensions, got shape {tuple(shape)}"
        return self._misfit(shape)

    def mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """Choose the weights to keep.

        Args:
            scores: Floating point, in the shape of the weight; larger = more important.
            sparsity: Share of zeros in [0, 1). N:M fixes its own (`1 - n/m`) and may be left out.

        Returns:
            Boolean mask of the same shape and device, True = kept. Unstructured keeps exactly
            `numel - floor(sparsity * numel + 0.5)` weights; units keep the highest mean scores such
            that the number of kept weights is nearest to that. At least one unit is kept. Of equal
            scores, the lower index (row-major) is kept.

        Raises:
            ValueError: Shape does not fit, scores are not floating point or hold NaN, bad sparsity.
        """
        self._check_scores(scores)
        if scores.numel() == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        return self._mask(scores, sparsity)

    def verify(self, tensor: Tensor) -> bool:
        """Say whether the zeros of `tensor` obey the pattern; a shape that does not fit never does.

        A unit must be all zero or hold no zero, except that one zero in a thousand may be a stray
        (a kept weight that happens to be 0). N:M asks for at most N nonzeros in every group.
        """
        if tensor.numel() == 0 or self.misfit(tensor.shape):
            return not self.misfit(tensor.shape)
        nonzero = as_3d(tensor.detach() != 0)
        zeros = nonzero.numel() - int(nonzero.count_nonzero())
        return self._obeys(nonzero, STRAY_ZEROS * zeros)

    def __str__(self) -> str:
        """Give the string that `parse` turns into this pattern."""
        return self._text()

    def _misfit(self, shape) -> str | None:
        return None

    def _check_scores(self, scores: Tensor) -> None:
        reason = self.misfit(scores.shape)
        if reason:
            raise ValueError(f'mask: expected scores that fit pattern "{self}"; it {reason}')
        if not scores.is_floating_point():
            raise ValueError(f"mask: expected floating-point scores, got {scores.dtype}")
        if torch.isnan(scores).any():
            raise ValueError("mask: expected scores without NaN, got NaN")
