"""Masks as bits: packed to one per weight, and laid over the bits of the weights."""

import numpy as np
import torch
from torch import Tensor

# Integers as wide as a number of so many bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def drop_(tensor: Tensor, mask: Tensor) -> Tensor:
    """Set what a mask drops to +0, in place, where there was NaN or Inf, too.

    On a CPU by the bits of the numbers: `masked_fill_` with a boolean mask takes six times as long,
    and a Pruner does this three times in every step.

    Args:
        tensor: Floating point, any shape and layout.
        mask: Boolean, of the same shape; True = kept.
    """
    whole = _INTEGERS.get(tensor.element_size())
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.requires_grad
    if whole is None or not plain:
        return tensor.masked_fill_(~mask, 0)
    # -1 has all bits set, 0 none.
    tensor.view(whole).bitwise_and_(mask.to(whole).neg_())
    return tensor
