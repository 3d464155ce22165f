"""Convolutions whose zeros differ from side to side, for kernels that know even padding alone.

Where the ops take `padding`, two integers stand for both sides of height and width, as in
nn.Conv2d; four are (top, left, bottom, right), as TensorFlow's "same" has them with a stride.
"""

import functools

import torch
from torch.nn.functional import pad


@functools.cache
def _places(name: str) -> dict[str, int]:
    """Where each argument stands; asked at a call, since kernels register before the op does."""
    arguments = getattr(torch.ops.sparsekern, name).default._schema.arguments
    return {argument.name: place for place, argument in enumerate(arguments)}


def pad_first(name: str, function):
    """An implementation of a convolution op that is given two integers, whatever comes.

    Args:
        name: The op, or its gradient, without namespace; others are handed back as they are.
        function: Takes the arguments in the order of the schema.
    """
    if "conv2d" not in name:
        return function

    @functools.wraps(function)
    def run(*args):
        place = _places(name)
        padding = args[place["padding"]]
        if len(padding) != 4:
            return function(*args)
        top, left, bottom, right = padding
        args = list(args)
        args[place["padding"]] = [0, 0]
        if "x" in place:
            args[place["x"]] = pad(args[place["x"]], (left, right, top, bottom))
            return function(*args)
        height, width = args[place["height"]], args[place["width"]]
        args[place["height"]], args[place["width"]] = height + top + bottom, width + left + right
        grad = function(*args)[:, :, top : top + height, left : left + width]
        return grad.contiguous()

    return run
