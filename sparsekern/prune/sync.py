"""The little that makes masks identical on every rank of a distributed run."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Say whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in place; nothing in a single process."""
    if is_distributed():
        for tensor in tensors:
            packed = tensor.contiguous()
            dist.all_reduce(packed)
            tensor.copy_(packed / dist.get_world_size())


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0, in place; nothing in a single process.

    Ranks compute the same masks from the same numbers; this guards against devices that round
    differently, and against random generators that differ.
    """
    if is_distributed():
        for tensor in tensors:
            packed = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
            dist.broadcast(packed, 0)
            tensor.copy_(packed)
