"""The N:M patterns: N kept of every M along the inputs, or along both inputs and outputs."""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .pattern_base import Pattern, is_int
from .tiles import as_3d


@dataclass(frozen=True)
class NM(Pattern):
    """N kept of every M consecutive weights along the input dimension (2:4: arXiv:2104.08378).

    In a convolution the groups run along the input channels at each kernel position. The input
    dimension must be a multiple of M.
    """

    n: int
    m: int

    def __post_init__(self):
        """Check the sizes."""
        if not (is_int(self.n) and is_int(self.m) and 1 <= self.n < self.m):
            raise ValueError(f"N:M: expected 1 <= N < M, got {self.n}:{self.m}")

    @property
    def sparsity(self) -> float:
        """Share of zeros, `1 - n/m`."""
        return 1 - self.n / self.m

    def _misfit(self, shape):
        if shape[1] % self.m == 0:
            return None
        return f"needs an input dimension that is a multiple of {self.m}, got {shape[1]}"

    def _mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        self.check_agrees("mask", sparsity)
        groups = self._groups(as_3d(scores))
        if self.m <= COMPARED and not bool(groups.isnan().any()):
            kept = largest_members(groups, self.n)
        else:
            best = groups.argsort(dim=2, descending=True, stable=True)[:, :, : self.n]
            kept = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
            kept.scatter_(2, best, True)
        return kept.reshape(scores.shape)

    def check_agrees(self, where: str, sparsity: float | None) -> None:
        """Refuse a sparsity other than the one the pattern fixes."""
        if sparsity is not None and not math.isclose(sparsity, self.sparsity, abs_tol=1e-6):
            fixed = f"sparsity {self.sparsity:g} (fixed by pattern {self})"
            raise ValueError(f"{where}: expected {fixed}, got {sparsity!r}")

    def counts(self, nonzero: Tensor) -> Tensor:
        """Nonzeros per group, from boolean `(out, in, positions)`."""
        groups = self._groups(nonzero)
        # A loop over the few members of a group is much faster than a sum over a short axis.
        total = groups[:, :, 0].to(torch.int32)
        for member in range(1, self.m):
            total += groups[:, :, member]
        return total

    def _groups(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1, self.m, tensor.shape[2])

    def _obeys(self, nonzero: Tensor, stray: float) -> bool:
        return bool((self.counts(nonzero) <= self.n).all())

    def _text(self):
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class TransposableNM(NM):
    """N kept of every M along the inputs and along the outputs, so that W and W^T are both N:M.

    Then the product with the transposed weight, which gives the gradient of the input, is N:M as
    well. Hubara et al. 2021, arXiv:2102.08124, section 4: of all masks of an M x M block with N per
    row and column, the one with the largest sum of scores. Found by trying them all (90 for 2:4),
    therefore M is at most 4. Both dimensions must be multiples of M.
    """

    def __post_init__(self):
        """Check the sizes."""
        super().__post_init__()
        if self.m > LARGEST_BLOCK:
            raise ValueError(f"N:MT: expected M of at most {LARGEST_BLOCK}, got {self}")

    def _misfit(self, shape):
        if shape[0] % self.m:
            return f"needs an output dimension that is a multiple of {self.m}, got {shape[0]}"
        return super()._misfit(shape)

    def _mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        self.check_agrees("mask", sparsity)
        blocks = self._blocks(as_3d(scores))
        grid, size = blocks.shape[:3], self.m * self.m
        choices = _block_masks(self.n, self.m).to(scores.device)
        flat = _finite(blocks.reshape(-1, size).double())
        best = [(part @ choices.T).argmax(1) for part in flat.split(CHUNK)]
        chosen = choices[torch.cat(best)].bool().view(*grid, self.m, self.m)
        return chosen.permute(0, 3, 1, 4, 2).reshape(scores.shape)

    def _blocks(self, tensor: Tensor) -> Tensor:
        """From `(out, in, positions)` to `(out / M, in / M, positions, M, M)`."""
        out, inner, area = tensor.shape
        tiles = tensor.reshape(out // self.m, self.m, inner // self.m, self.m, area)
        return tiles.permute(0, 2, 4, 1, 3)

    def _obeys(self, nonzero: Tensor, stray: float) -> bool:
        flipped = nonzero.transpose(0, 1)
        return super()._obeys(nonzero, stray) and super()._obeys(flipped, stray)

    def _text(self):
        return f"{self.n}:{self.m}T"


COMPARED = 8  # groups up to this size are compared member by member, which beats sorting them
LARGEST_BLOCK = 4
CHUNK = 1 << 16  # blocks whose masks are tried at a time


def largest_members(groups: Tensor, n: int) -> Tensor:
    """Mask of the n largest along dimension 2, of equal ones the first; all pairs are compared."""
    members = groups.unbind(2)
    ahead = [
        torch.zeros(members[0].shape, dtype=torch.uint8, device=groups.device) for _ in members
    ]
    for i, j in itertools.combinations(range(len(members)), 2):
        first = members[i] >= members[j]
        ahead[j] += first
        ahead[i] += ~first
    return torch.stack([larger < n for larger in ahead], 2)


@cache
def _block_masks(n: int, m: int) -> Tensor:
    """All M x M masks with N per row and column, float64 `(masks, M * M)`, first indices first."""
    rows = [tuple(i in kept for i in range(m)) for kept in itertools.combinations(range(m), n)]
    masks = [
        sum(choice, ())
        for choice in itertools.product(rows, repeat=m)
        if all(sum(column) == n for column in zip(*choice))
    ]
    return torch.tensor(masks, dtype=torch.float64)


def _finite(blocks: Tensor) -> Tensor:
    """Replace +-inf (must, must not) by what outweighs all other scores of the block together."""
    if bool(torch.isfinite(blocks).all()):
        return blocks
    sizes = blocks.abs().masked_fill(~torch.isfinite(blocks), 0)
    limit = (sizes.sum(1, keepdim=True) * 4 + 1).expand_as(blocks)
    return torch.where(torch.isinf(blocks), limit.copysign(blocks), blocks)
