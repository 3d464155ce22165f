"""Masks packed to one bit per weight."""

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean mask of any shape into uint8 `(ceil(numel / 8),)` on the CPU."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack(packed: Tensor, shape) -> Tensor:
    """Unpack `pack(mask)` to a boolean mask of a shape.

    Raises:
        ValueError: The bits are not as many as the shape needs.
    """
    numel = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.shape != (-(-numel // 8),):
        got = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"expected uint8 ({-(-numel // 8)},) for shape {tuple(shape)}, got {got}")
    bits = np.unpackbits(packed.cpu().numpy(), count=numel).astype(bool)
    return torch.from_numpy(bits).reshape(tuple(shape))
