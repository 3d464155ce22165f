"""Batch normalisation between sparse convolutions in training, which work in the contiguous layout.

On CPU torch normalises channels_last images several times faster than contiguous ones. Our op does
contiguous ones in one trip through memory each way, with the ReLU behind.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .chain import is_hooked, shallow_copy, slots
from .graph_leaf import GraphLeaf, Proxy
from .measure.timer import interleaved
from .ops._library import activate
from .ops.norm import call_batch_norm
from .tune import training_call


class ContiguousBatchNorm2d(GraphLeaf, nn.BatchNorm2d):
    """nn.BatchNorm2d with an activation; the same parameters and buffers, contiguous results.

    Attributes:
        original: The module it stands for, in a tuple, so that it is no child of this one.
        activation: `none`, `relu` or `relu6`.
    """

    original: tuple[nn.BatchNorm2d]
    activation: str

    def forward(self, x: Tensor) -> Tensor:
        """As nn.BatchNorm2d and the activation, for x `(n, c, h, w)`."""
        if isinstance(x, Proxy):
            return self.traced(x)
        batch = self.training or self.running_mean is None
        known = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
        if not batch or not known or x.numel() <= x.shape[1]:  # torch refuses single values
            return activate(super().forward(x), self.activation, "batch_norm")
        y, mean, var = call_batch_norm(x, self.weight, self.bias, self.eps, self.activation)
        if self.training and self.track_running_stats:
            self._remember(mean.detach(), var.detach(), x.numel() // x.shape[1])
        return y

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics; in place, as the original has the same tensors."""
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # the mean over all batches
            share = 1 / self.num_batches_tracked.to(mean.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var * (count / (count - 1)), share)

    def extra_repr(self) -> str:
        """Also the activation."""
        return f"{super().extra_repr()}, activation={self.activation}"


def find_norms(model: nn.Module) -> set[nn.BatchNorm2d]:
    """Normalisations that a ContiguousBatchNorm2d could stand for."""
    places = slots(model, lambda m: type(m) is nn.BatchNorm2d and m.affine and not is_hooked(m))
    return {slot.module for slot in places}


def faster_norms(
    norms: set[nn.BatchNorm2d],
    specs,
    behind: dict[nn.Module, tuple[nn.Module, str]],
    budget_s: float,
) -> dict[nn.Module, ContiguousBatchNorm2d]:
    """Stand-ins for the normalisations that train faster by our op, by the module.

    Args:
        norms: What `find_norms` found; not changed.
        specs: How often each module saw which input, by its id.
        behind: The activation that may be fused into a normalisation: the module, what it is.
        budget_s: Seconds of timing per normalisation.
    """
    found = {}
    for norm in norms:
        seen = specs.get(id(norm), {})
        if not seen or any(s.channels_last or len(s.shape) != 4 for s in seen):
            continue
        twin = shallow_copy(norm)
        twin.__class__ = ContiguousBatchNorm2d
        twin.original, twin.activation = (norm,), "none"
        if _gain(norm, twin, behind.get(norm), next(iter(seen)), budget_s) > 1:
            found[norm] = twin
    return found


def _gain(norm, twin, behind: tuple[nn.Module, str] | None, spec, budget_s: float) -> float:
    """How many times faster the stand-in trains; statistics stay as they are."""
    x = spec.make("cpu")
    plain, ours = shallow_copy(norm), shallow_copy(twin)
    for module in (plain, ours):
        module.train()
        module._buffers = {k: b if b is None else b.clone() for k, b in norm._buffers.items()}
    if behind is not None:
        plain, ours.activation = nn.Sequential(plain, behind[0]), behind[1]
    times = interleaved([training_call(m, x) for m in (plain, ours)], budget_s=budget_s)
    return times[0].median_ms / times[1].median_ms


def restore_norms(model: nn.Module, unfused: set[nn.Module]) -> None:
    """Hang the plain modules back, behind them the activation of those not in `unfused`."""
    for slot in slots(model, lambda m: isinstance(m, ContiguousBatchNorm2d)):
        twin = slot.module
        norm = twin.original[0]
        # .to() and load_state_dict(assign=True) on the model have replaced those of the stand-in.
        norm._parameters.update(twin._parameters)
        norm._buffers.update(twin._buffers)
        norm.train(twin.training)
        keeps = twin.activation != "none" and twin not in unfused
        acts = {"relu": nn.ReLU, "relu6": nn.ReLU6}
        slot.put(nn.Sequential(norm, acts[twin.activation]()) if keeps else norm)
