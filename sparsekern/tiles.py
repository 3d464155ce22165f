"""Weights as three axes (out, in, flattened kernel positions) cut into tiles."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def extent_3d(shape) -> tuple[int, int, int]:
    """Shape as (out, in, flattened kernel positions)."""
    return shape[0], shape[1], math.prod(shape[2:])


def as_3d(tensor: Tensor) -> Tensor:
    """View a weight as (out, in, flattened kernel positions)."""
    return tensor.reshape(extent_3d(tensor.shape))


def tile_lengths(extent: int, tile: int) -> Tensor:
    """Lengths of the tiles along one axis, int64; the last may be shorter."""
    starts = torch.arange(0, extent, tile)
    return (extent - starts).clamp(max=tile)


def split_tiles(tensor: Tensor, tile: tuple[int, int, int]) -> Tensor:
    """Split each axis into (grid, tile), zero-padded at the edges."""
    short = [-e % t for e, t in zip(tensor.shape, tile, strict=True)]
    if any(short):
        tensor = F.pad(tensor, (0, short[2], 0, short[1], 0, short[0]))
    rows, cols, positions = tensor.shape
    split = (rows // tile[0], tile[0], cols // tile[1], tile[1], positions // tile[2], tile[2])
    return tensor.reshape(split)


def tile_any(flags: Tensor, tile: tuple[int, int, int]) -> Tensor:
    """Say for each tile, in row-major order, whether any flag in it is set."""
    view = split_tiles(flags, tile)
    for axis in (5, 3, 1):
        view = view.any(axis) if view.shape[axis] > 1 else view.squeeze(axis)
    return view.flatten()
