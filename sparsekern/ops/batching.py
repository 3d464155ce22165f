"""How an op runs under torch.vmap: samples that only differ in their tokens are one product."""

import torch
from torch import Tensor

from ._library import LIBRARY

# Arguments whose rows (or images) a product takes one by one, whatever their number.
_TOKENS = ("x", "grad", "residual")


def register(op, *, conv: bool = False, folds: bool = True) -> None:
    """Register the rule of an op.

    Args:
        op: The op. Its tokens come as `(..., features)`, those of a convolution as `(n, c, h, w)`.
        conv: Whether it is a convolution.
        folds: Whether the result has a part for each token. Otherwise, and where other arguments
            differ from sample to sample, the samples run one after the other.
    """
    names = [argument.name for argument in op._schema.arguments]

    def rule(info, in_dims, *args):
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]
        args = [a if dim is None else a.movedim(dim, 0) for a, dim in zip(args, dims, strict=True)]
        batched = [dim is not None for dim in dims]
        if not folds or any(b and n not in _TOKENS for n, b in zip(names, batched, strict=False)):
            return _one_by_one(op, info.batch_size, batched, args)
        for i, argument in enumerate(args):
            if names[i] in _TOKENS and argument is not None:
                tokens = (
                    argument if batched[i] else argument.expand(info.batch_size, *argument.shape)
                )
                args[i] = tokens.flatten(0, 1) if conv else tokens
        y = op(*args)
        return (
            y.unflatten(0, (info.batch_size, y.shape[0] // max(1, info.batch_size))) if conv else y
        ), 0

    torch.library.register_vmap(op._schema.name, rule, lib=LIBRARY)


def _one_by_one(op, size: int, batched: list[bool], args: list):
    """The results of all samples, stacked in front."""
    if size == 0:  # one made up, for the shape of the results
        args = [
            a.new_zeros(1, *a.shape[1:]) if b else a for a, b in zip(args, batched, strict=True)
        ]
    results = [
        op(*(a[i] if b else a for a, b in zip(args, batched, strict=True)))
        for i in range(max(1, size))
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:size], 0
    return tuple(torch.stack(parts)[:size] for parts in zip(*results)), (0,) * len(results[0])
