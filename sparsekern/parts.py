"""Batches of images in parts, so that activations stay in the cache from layer to layer.

A layer reads what the layer before wrote. The activations of one image of a convolutional network
fit the L2 and L3 caches, those of a batch do not, and sparse layers, which do a tenth of the
arithmetic, then wait for memory. Running the whole model for a few images at a time computes the
same. Sparsity-aware engines do it for slices of single layers ("depth-wise", Kurtz et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .chain import is_hooked
from .measure.structure import forward_call, output_error, tensors_of
from .measure.timer import interleaved, speedup

SIZES = (1, 2, 4)
MIN_GAIN = 1.05
AGREEMENT = 1e-5  # of the largest output; sums are the same, their order may depend on the batch


class InParts:
    """The forward of a model that takes a batch of images in parts.

    Calls with other arguments than one tensor of four dimensions, in training mode, with gradients,
    or of torch.compile run the forward as it was written.

    Attributes:
        model: The module whose forward this is.
        size: Images of a part.
    """

    def __init__(self, model: nn.Module, size: int):
        self.model, self.size = model, size

    def __call__(self, *args, **kwargs):
        """The outputs for the whole batch."""
        forward = type(self.model).forward
        name, x = next(iter(kwargs.items()), (None, args[0] if args else None))
        plain = len(args) + len(kwargs) != 1 or not isinstance(x, Tensor) or x.dim() != 4
        if plain or len(x) <= self.size or self.model.training or _is_recorded():
            return forward(self.model, *args, **kwargs)
        parts = x.split(self.size)
        if name is None:
            return _joined([forward(self.model, part) for part in parts])
        return _joined([forward(self.model, **{name: part}) for part in parts])


def _is_recorded() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _joined(outputs: list):
    """Outputs of the parts, tensor by tensor one behind the other; of the kind of the first."""
    flat = [tree_flatten(output) for output in outputs]
    leaves = [
        torch.cat(column) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*(found for found, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])


@dataclass(frozen=True)
class RootSlot:
    """The place of the model's forward."""

    module: nn.Module
    name: str = ""

    def put(self, forward: InParts | nn.Module) -> None:
        """Give the model this forward; the model itself stands for its own."""
        self.module.__dict__.pop("forward", None)
        if isinstance(forward, InParts):
            self.module.forward = forward


def restore_whole_batches(model: nn.Module) -> None:
    """Give the model its own forward back."""
    if isinstance(model.__dict__.get("forward"), InParts):
        del model.forward


def faster_in_parts(model: nn.Module, inputs, budget_s: float) -> tuple[InParts | None, float]:
    """The fastest way to run a model in parts, and how many times faster it is than whole.

    None where whole is as fast, the inputs are no batch of images, or an output of a part is not
    that of the whole batch.
    """
    given = list(tensors_of(inputs).values())
    images = len(given) == 1 and given[0].dim() == 4 and given[0].is_floating_point()
    if not images or len(given[0]) < 2 or is_hooked(model):
        return None, 1.0
    sizes = [size for size in SIZES if size < len(given[0])]
    whole = forward_call(model, inputs)
    ways = [InParts(model, size) for size in sizes]
    calls = [forward_call(way, inputs) for way in ways]
    with torch.inference_mode():
        if not _agree(whole, calls[0], len(given[0])):
            return None, 1.0
        times = interleaved([whole, *calls], budget_s=budget_s, min_rounds=5)
    best = min(range(len(ways)), key=lambda i: times[i + 1].median_ms)
    gain = speedup(times[0], times[best + 1]).median
    if gain >= MIN_GAIN:  # the best of several is also the luckiest: once more, in the other way
        with torch.no_grad():
            again = interleaved([whole, calls[best]], budget_s=budget_s / 2, min_rounds=5)
        gain = min(gain, speedup(*again).median)
    return (ways[best], gain) if gain >= MIN_GAIN else (None, gain)


def _agree(whole, in_parts, images: int) -> bool:
    """Whether every output is a tensor with one row per image, the same both ways."""
    try:
        want = whole()
        leaves = [leaf for leaf in tree_flatten(want)[0] if leaf is not None]
        rows = all(isinstance(t, Tensor) and t.dim() > 0 and len(t) == images for t in leaves)
        return rows and output_error(want, in_parts(), "convert_to_sparse")[1] <= AGREEMENT
    except Exception:  # outputs that are no tensors, or do not fit together
        return False
