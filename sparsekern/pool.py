"""Max pooling between sparse convolutions, which work in the contiguous layout.

On CPU torch pools channels_last images several times faster than contiguous ones: it vectorises
over the channels. The detour changes no value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .chain import Slot, is_hooked, shallow_copy, slots
from .graph_leaf import GraphLeaf, Proxy
from .measure.timer import interleaved
from .ops.derivatives import in_transform
from .tune import MIN_GAIN, called, inference_call, training_call


class ChannelsLastMaxPool2d(GraphLeaf, nn.MaxPool2d):
    """nn.MaxPool2d by way of channels_last: `(n, c, h, w)` contiguous in and out.

    Attributes:
        original: The module it stands for, in a tuple, so that it is no child of this one.
    """

    original: tuple[nn.MaxPool2d]

    def forward(self, x: Tensor) -> Tensor:
        """As nn.MaxPool2d; the result is contiguous."""
        if isinstance(x, Proxy):
            return self.traced(x)
        if x.dim() != 4 or in_transform():  # an image alone, also one that torch.vmap picks
            return super().forward(x).contiguous()
        if x.requires_grad and torch.is_grad_enabled() and not torch.jit.is_tracing():
            sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
            return _MaxPool.apply(x, [list(_pair(size)) for size in sizes], self.ceil_mode)
        last = x.contiguous(memory_format=torch.channels_last)
        return super().forward(last).contiguous()


class _MaxPool(torch.autograd.Function):
    """Forward by way of channels_last; the gradient, a scatter, in the contiguous layout."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[list[int]], ceil_mode: bool) -> Tensor:
        last = x.contiguous(memory_format=torch.channels_last)
        y, index = torch.ops.aten.max_pool2d_with_indices(last, *sizes, ceil_mode)
        ctx.save_for_backward(x, index.contiguous())
        ctx.geometry = *sizes, ceil_mode
        return y.contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, index = ctx.saved_tensors
        back = torch.ops.aten.max_pool2d_with_indices_backward
        return back(grad.contiguous(), x, *ctx.geometry, index), None, None


def faster_pools(
    model: nn.Module, specs, budget_s: float, training: bool = False
) -> list[tuple[Slot, nn.Module]]:
    """Places of max pools that run faster by way of channels_last, and what to hang there.

    Args:
        model: The model; not changed.
        specs: How often each module saw which input, by its id.
        budget_s: Seconds of timing per pool.
        training: Whether the gradient of the input is computed, too.
    """
    found = []
    for slot in slots(model, lambda m: type(m) is nn.MaxPool2d and not is_hooked(m)):
        seen = specs.get(id(slot.module), {})
        plain = all(
            len(s.shape) == 4 and not s.channels_last and s.dtype.is_floating_point for s in seen
        )
        if slot.module.return_indices or not seen or not plain:
            continue
        twin = shallow_copy(slot.module)
        twin.__class__ = ChannelsLastMaxPool2d
        twin.original = (slot.module,)
        if _gain(slot.module, twin, next(iter(seen)), budget_s, training) >= MIN_GAIN:
            found.append((slot, twin))
    return found


def _gain(pool: nn.Module, twin: nn.Module, spec, budget_s: float, training: bool) -> float:
    """How many times faster, in the way of calling in which that is least."""
    if training:
        return _gain_when("training", pool, twin, spec, budget_s)
    ways = ("inference_mode", "gradients")
    return min(_gain_when(way, pool, twin, spec, budget_s / len(ways)) for way in ways)


def _gain_when(way: str, pool: nn.Module, twin: nn.Module, spec, budget_s: float) -> float:
    x = spec.make("cpu")
    if way == "training":
        calls = [training_call(m, x) for m in (pool, twin)]
    else:
        x.requires_grad_(way == "gradients")
        calls = [inference_call([m], x) for m in (pool, twin)]
    with called(way):
        times = interleaved(calls, budget_s=budget_s)
    return times[0].median_ms / times[1].median_ms


def restore_pools(model: nn.Module) -> None:
    """Hang the plain modules back."""
    for slot in slots(model, lambda m: isinstance(m, ChannelsLastMaxPool2d)):
        slot.put(slot.module.original[0].train(slot.module.training))
